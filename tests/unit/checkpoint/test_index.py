from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardforge.checkpoint import index
from shardforge.checkpoint.index import Chunk, Entry
from shardforge.core.errors import CheckpointError

FILE = "rank-00000.safetensors"


def entry(*chunks: Chunk, dtype: str = "float32", shape: tuple[int, ...] = (4, 2)) -> Entry:
    return Entry(dtype, shape, chunks)


def half(start: int, file: str = FILE) -> Chunk:
    return Chunk((start, 0), (2, 2), file, f"x[{start}]")


def put(folder: Path, value: Entry) -> Path:
    (folder / index.NAME).write_bytes(index.to_json({"x": value}))
    return folder


def test_an_index_comes_back_as_it_was_written(tmp_path):
    value = entry(half(0), half(2))
    assert index.read(put(tmp_path, value)) == {"x": value}


@pytest.mark.parametrize(
    "name",
    [
        *("../rank-00000.safetensors", "/etc/passwd", "sub/rank-00000.safetensors", "rank-00000.safetensors/..", ""),
        *(
            "rank-0.safetensors",
            "weights.pt",
            ".metadata",
            "rank-00000.safetensors\n",
            "rank-\u0660\u0660\u0660\u0660\u0660.safetensors",
        ),
        *(7, None, ["rank-00000.safetensors"]),
    ],
    ids=repr,
)
def test_a_file_name_that_could_lead_outside_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        index.read(put(tmp_path, entry(half(0), half(2, name))))


def test_a_link_that_leads_outside_is_refused(tmp_path):
    (tmp_path / FILE).symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        index.read(put(tmp_path, entry(half(0), half(2))))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (entry(half(0)), "hold 4 numbers, the tensor 8"),
        (entry(half(0), half(0)), "each must come once"),
        (entry(half(0), half(3)), "reaches 5 in a dimension of 4"),
        (entry(Chunk((0,), (8,), FILE, "x")), "1 dimensions, the tensor 2"),
        (entry(half(0), half(2), dtype="object"), "type 'object' is unknown"),
        (entry(Chunk((-2, 0), (6, 2), FILE, "x")), "-2 is not a size"),
        (entry(Chunk((0, 0), (4, 2.0), FILE, "x")), "2.0 is not a size"),
        (entry(Chunk((0, 0), (4, 2), FILE, 5)), "key 5 is not text"),
    ],
    ids=["gap", "overlap", "bounds", "dimensions", "type", "negative", "fraction", "key"],
)
def test_an_entry_that_makes_no_sense_is_named(tmp_path, value, told):
    with pytest.raises(CheckpointError, match=told):
        index.read(put(tmp_path, value))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 9, "tensors": {}}', '{"format":1,"tensors":[]}']
)
def test_a_foreign_document_is_refused(tmp_path, text):
    (tmp_path / index.NAME).write_text(text)
    with pytest.raises(CheckpointError):
        index.read(tmp_path)


def test_all_wrong_entries_are_told_at_once(tmp_path):
    document = json.loads(index.to_json({name: entry(half(0)) for name in "abc"}))
    (tmp_path / index.NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"(?s)3 entries.*a: .*b: .*c: "):
        index.read(tmp_path)


def test_what_nobody_asks_for_makes_no_difference():
    entries = {"model.x": entry(), "optim.x.step": entry()}
    assert index.differences(entries, {"model.x": torch.zeros(4, 2)}) == []


def test_what_another_rank_asks_for_makes_no_difference():
    entries = {"model.x": entry(), "model.y": entry(), "model.z": entry()}
    lines = index.differences(entries, {"model.x": torch.zeros(4, 2)}, elsewhere={"model.x", "model.y"})
    assert lines == ["model.z: [4, 2] float32 in the checkpoint, absent here"]


def test_each_tensor_that_cannot_be_filled_is_named():
    entries = {"model.x": entry(), "model.y": entry()}
    lines = index.differences(entries, {"model.x": torch.zeros(4, 2).double(), "model.z": torch.zeros(1)})
    assert lines == [
        "model.x: [4, 2] float32 in the checkpoint, [4, 2] float64 here",
        "model.y: [4, 2] float32 in the checkpoint, absent here",
        "model.z: absent in the checkpoint, [1] float32 here",
    ]


def test_a_long_list_is_cut_and_counted():
    assert index.shorten([str(i) for i in range(12)]).splitlines()[-1].strip() == "and 4 more"
