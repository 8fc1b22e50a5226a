from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

from shardforge.checkpoint import index
from shardforge.checkpoint.storage import ShardReader, ShardWriter
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.layout import Layout
from tests.ranks import Ranks
from tests.unit.checkpoint import sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
LAYOUTS = [Layout.parse(text) for text in ("one", "dp4", "dp2-tp2", "rep2-dp2", "rep2-tp2")]
OTHERS = [Layout.parse(text) for text in ("one", "tp2", "dp4", "dp2-tp2")]


def write(folder: Path, tensors: dict[str, object], **options: int) -> ShardWriter:
    writer = ShardWriter(folder, 0, **options)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(dict(tensors), storage_writer=writer, planner=planner)
    return writer


def read(folder: Path, tensors: dict[str, Tensor]) -> ShardReader:
    reader = ShardReader(folder, index.read(folder))
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.load(dict(tensors), storage_reader=reader, planner=planner)
    return reader


def on(ranks: Callable[[int], Ranks], layout: Layout, function: Callable, *args: object) -> list:
    """The function's result on each rank of a layout; one process needs no group."""
    if layout.world_size == 1:
        return [function(*args)]
    return ranks(layout.world_size).run(function, *args)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory) -> Callable[[Layout], Path]:
    """The folder of checkpoints in which a layout has saved the model of seed 3, each written once."""
    folders: dict[Layout, Path] = {}

    def of(layout: Layout) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(str(layout)) / "checkpoints"
            on(ranks, layout, sharded.save, folders[layout], layout, 3)
        return folders[layout]

    return of


@pytest.mark.parametrize("here", OTHERS, ids=str)
@pytest.mark.parametrize("there", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_other_saved_bit_for_bit(ranks, saved, there, here):
    assert on(ranks, here, sharded.differing, saved(there), here, 3) == [[]] * here.world_size


def test_a_weight_split_twice_along_one_dimension_is_among_the_cases(ranks):
    assert ranks(4).run(placements_of_up) == ["[_StridedShard, Shard]"] * 4


def placements_of_up() -> str:
    net, _ = sharded.build(Layout(dp_shard=2, tp=2), 1)
    return f"[{', '.join(type(placement).__name__ for placement in net.up.placements)}]"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_several_ranks_hold_is_written_once(saved, layout):
    folder = saved(layout) / "step-00000003"
    tensors = sum(entry.bytes for entry in index.read(folder).values())
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little")
        for path in folder.iterdir()
        if index.is_file_name(path.name)
    )
    assert sum(path.stat().st_size for path in folder.glob("rank-*")) == tensors + headers


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (5, 3)], ids=str)
def test_every_type_and_shape_comes_back(tmp_path, dtype, shape):
    kind = TYPES[dtype][0]
    numbers = (torch.rand(shape) * 3).to(kind)
    write(tmp_path, {"x": numbers})
    loaded = torch.zeros(shape).to(kind)
    read(tmp_path, {"x": loaded})
    assert torch.equal(loaded.view(torch.uint8) if shape else loaded, numbers.view(torch.uint8) if shape else numbers)


def test_a_transposed_tensor_is_saved_in_its_own_order(tmp_path):
    numbers = torch.arange(6.0).view(2, 3).t()
    write(tmp_path, {"x": numbers})
    loaded = torch.zeros(3, 2)
    read(tmp_path, {"x": loaded})
    assert torch.equal(loaded, numbers)


def test_a_rank_with_much_to_write_begins_a_new_file(tmp_path):
    tensors = {f"x{i}": torch.full((10,), float(i)) for i in range(5)}
    writer = write(tmp_path, tensors, file_bytes=80)
    assert [written.file for written in writer.files] == [
        "rank-00000-1.safetensors",
        "rank-00000-2.safetensors",
        "rank-00000.safetensors",
    ]
    loaded = {name: torch.zeros(10) for name in tensors}
    read(tmp_path, loaded)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_an_object_that_is_no_tensor_is_refused(tmp_path):
    assert "is not a tensor" in str(write(tmp_path, {"x": torch.zeros(2), "y": {"a": 1}}).error)


def test_a_file_that_is_not_what_the_index_says_is_refused(tmp_path):
    write(tmp_path, {"x": torch.zeros(2, 3)})
    text = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(text.replace("float32", "int32"))
    assert "is F32[2, 3] here and I32[2, 3] in the index" in str(read(tmp_path, {"x": torch.zeros(2, 3)}).error)


def test_nothing_is_unpickled_while_loading(tmp_path, monkeypatch):
    write(tmp_path, {"x": torch.ones(2)})

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    loaded = torch.zeros(2)
    read(tmp_path, {"x": loaded})
    assert loaded.tolist() == [1, 1]
