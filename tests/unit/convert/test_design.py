from __future__ import annotations

import pytest
import torch

from shardforge.convert import design
from shardforge.convert.format import Item, Options
from shardforge.convert.plan import formats
from shardforge.core.errors import CheckpointError
from shardforge.families.forms import SAME, Rows
from shardforge.families.open import open_source
from shardforge.families.statemap import Group


def test_every_file_of_the_folder_is_a_format():
    found = formats()
    assert {"huggingface", "shardforge"} <= found.keys()
    assert all(format.HELP and format.NAME == name for name, format in found.items())


def test_weights_are_cast_and_moments_are_not(run):
    source, options = open_source(run), Options(to="huggingface", dtype="bf16")
    assert set(design.types(source, options).values()) == {"bfloat16"}
    assert design.kept(source, options) == {"exp_avg": "float32", "exp_avg_sq": "float32", "step": "float32"}


def test_dropped_moments_are_none(run):
    assert design.kept(open_source(run), Options(to="shardforge", moments="drop")) == {}


def test_a_group_of_two_types_gets_the_wider_one(run):
    source = open_source(run)
    names = ("blocks.0.ffn.gate.weight", "blocks.0.ffn.up.weight")
    (made,) = design.items(Group(names, ("x",), Rows(2)), {names[0]: "bfloat16", names[1]: "float32"}, source)
    assert made.dtype == "float32" and made.shape == (48, 16)


@pytest.mark.parametrize("limit, sizes", [(1, [1] * 5), (8, [2, 2, 1]), (10**6, [5])])
def test_a_file_is_closed_when_it_has_reached_its_size(limit, sizes):
    items = [Item(str(n), "float32", (1,), ("a",), 0, SAME) for n in range(5)]
    assert [len(batch) for batch in design.sharded(items, limit)] == sizes


@pytest.mark.parametrize(
    "total, size", [(0, 256 << 20), (1 << 30, 256 << 20), ((16 << 30) + 1, (1 << 30) + (1 << 20)), (1 << 40, 4 << 30)]
)
def test_a_file_is_a_16th_of_all_in_whole_mib_unless_somebody_chose(total, size):
    assert design.shard_bytes(total) == size


def test_the_size_of_all_decides_that_of_files(monkeypatch):
    monkeypatch.setattr(design, "SHARD_BYTES", (8, 1 << 30))
    items = [Item(str(n), "float32", (1 << 18,), ("a",), 0, SAME) for n in range(64)]
    assert [len(batch) for batch in design.sharded(items, None)] == [4] * 16


def test_no_items_are_no_files():
    assert design.sharded([], 10) == []


def test_a_layout_without_a_place_is_refused():
    with pytest.raises(CheckpointError, match="no layout"):
        design.no_layout(Options(to="x", layout={"tp": 2}), "this folder")


def test_bytes_of_an_item_are_those_of_its_numbers():
    assert Item("x", "bfloat16", (3, 5), ("a",), 0, SAME).bytes == 30 == torch.zeros(3, 5, dtype=torch.bfloat16).nbytes
