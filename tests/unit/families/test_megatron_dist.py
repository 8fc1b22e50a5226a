"""The index and the pieces of torch_dist, when they lie."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from shardforge.core.errors import CheckpointError
from shardforge.families import megatron_dist
from shardforge.families.megatron_dist import DistFolder
from tests.unit.families.torchscript import program

KEY = "decoder.layers.mlp.linear_fc2.weight"
EXPERTS = "decoder.layers.mlp.experts.experts.linear_fc2.weight"


def indexed(path: Path, key: str, size: Any, boxes: list[tuple[Any, Any]], dtype: Any = torch.float32) -> Path:
    """A folder with nothing but an index of one tensor in pieces, (offsets, sizes); all of them are file 0.distcp."""
    path.mkdir(exist_ok=True)
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    entry = TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)
    file = path / "0.distcp"
    place = _StorageInfo(file.name, 0, file.stat().st_size if file.exists() else 0)
    places = {MetadataIndex(key, offsets): place for offsets, _ in boxes}
    (path / ".metadata").write_bytes(pickle.dumps(Metadata({key: entry}, None, places)))
    return path


@pytest.fixture
def counted(monkeypatch):
    """Numbers of tensors that were enumerated."""
    made: list[int] = []

    def product(*ranges: range):
        made.append(1)
        return iter(())

    monkeypatch.setattr(megatron_dist, "product", product)
    return made


@pytest.mark.parametrize("key, size", [(KEY, (10**8, 2, 3)), (EXPERTS, (10**4, 10**4, 2, 3))])
def test_more_layers_than_its_pieces_have_are_refused_before_any_is_named(tmp_path, counted, key, size):
    path = indexed(tmp_path / "x", key, torch.Size(size), [((0,) * len(size), (1,) * (len(size) - 2) + (2, 3))])
    with pytest.raises(CheckpointError, match=r"100000000 layers or experts, and its pieces are of 1\n"):
        DistFolder(path, {})
    assert not counted


def test_more_tensors_than_any_model_has_are_refused_before_any_is_named(tmp_path, counted):
    path = indexed(tmp_path / "x", KEY, torch.Size((10**8, 2, 3)), [((0, 0, 0), (10**8, 2, 3))])
    with pytest.raises(CheckpointError, match=r"claims 100000000 tensors, 1000000 are the most"):
        DistFolder(path, {})
    assert not counted


def test_layers_in_one_piece_or_in_many_are_all_named(tmp_path):
    names = {f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(4)}
    whole = indexed(tmp_path / "x", KEY, torch.Size((4, 2, 3)), [((0, 0, 0), (4, 2, 3))])
    cut = [((layer, 0, half), (1, 2, half + 1)) for layer in range(4) for half in (0, 1)]
    apart = indexed(tmp_path / "y", KEY, torch.Size((4, 2, 3)), cut)
    assert DistFolder(whole, {}).names.keys() == DistFolder(apart, {}).names.keys() == names


SENSELESS: dict[str, tuple[Any, Any]] = {
    "a size of text": ("many", torch.float32),
    "fractions": ((1.5, 2), torch.float32),
    "negative": ((-1, 2, 3), torch.float32),
    "no dimension for layers": ((), torch.float32),
    "a number": (5, torch.float32),
    "complex numbers": ((1, 2, 3), torch.complex64),
    "an unknown type": ((1, 2, 3), "float99"),
    "no type": ((1, 2, 3), None),
}


@pytest.mark.parametrize("size, dtype", SENSELESS.values(), ids=SENSELESS)
def test_an_entry_that_makes_no_sense_is_told_with_the_index(tmp_path, size, dtype):
    path = indexed(tmp_path / "x", KEY, size, [((0, 0, 0), (1, 2, 3))], dtype)
    with pytest.raises(CheckpointError, match=r"\.metadata  (.|\n)*fix: copy it again"):
        DistFolder(path, {})


def test_a_program_in_the_place_of_a_piece_does_not_run(tmp_path):
    (tmp_path / "x").mkdir()
    program(tmp_path / "x" / "0.distcp", tmp_path / "ran")
    path = indexed(tmp_path / "x", KEY, torch.Size((1, 2, 3)), [((0, 0, 0), (1, 2, 3))])
    with pytest.raises(CheckpointError, match=r"TorchScript"):
        DistFolder(path, {}).read("decoder.layers.0.mlp.linear_fc2.weight")
    assert not (tmp_path / "ran").exists()


def test_a_program_in_the_place_of_what_is_kept_beside_does_not_run(tmp_path):
    path = indexed(tmp_path / "x", KEY, torch.Size((1, 2, 3)), [((0, 0, 0), (1, 2, 3))])
    program(path / "common.pt", tmp_path / "ran")
    with pytest.raises(CheckpointError, match=r"TorchScript"):
        DistFolder(path)
    assert not (tmp_path / "ran").exists()
