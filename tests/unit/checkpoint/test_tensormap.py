from __future__ import annotations

import os

import pytest
import torch

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.core.errors import CheckpointError


@pytest.fixture
def made(tmp_path):
    """A file with a tensor of every type, a number, and tensors without numbers."""
    chance = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(5, 7, generator=chance) * 9).to(dtype) for name, (dtype, _) in TYPES.items()}
    tensors |= {"number": torch.tensor(3.5), "none": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    parts = [
        Part(name, str(each.dtype)[6:], tuple(each.shape), lambda each=each: each) for name, each in tensors.items()
    ]
    tensorfile.write_tensors(path, parts, {"format": "pt"})
    return path, tensors


def same(one, other):
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bytes(tensorfile.raw(one)) == bytes(tensorfile.raw(other))
    )


def test_every_type_is_read_as_it_was_written(made):
    path, tensors = made
    with tensorfile.opened(path) as file:
        assert set(file.keys()) == tensors.keys()
        assert all(same(file.get_tensor(name), each) for name, each in tensors.items())


def test_the_library_of_the_format_reads_the_same(made):
    from safetensors import safe_open

    path, tensors = made
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(same(file.get_tensor(name), each) for name, each in tensors.items())


def test_a_slice_is_a_part_of_it(made):
    path, tensors = made
    with tensorfile.opened(path) as file:
        part = file.get_slice("float32")
        assert (part.get_dtype(), part.get_shape()) == ("F32", [5, 7])
        assert torch.equal(part[1:3, ::2], tensors["float32"][1:3, ::2])


def test_what_was_read_stays_and_may_be_changed(made):
    path, tensors = made
    before = path.read_bytes()
    with tensorfile.opened(path) as file:
        found = file.get_tensor("float32")
    found.zero_()
    assert path.read_bytes() == before and not torch.equal(found, tensors["float32"])


def test_a_tensor_that_is_not_there_is_told(made):
    with tensorfile.opened(made[0]) as file, pytest.raises(CheckpointError, match="tensor other is missing"):
        file.get_tensor("other")


def test_a_file_that_was_cut_since_is_told(made):
    path, _ = made
    with tensorfile.opened(path) as file:
        os.truncate(path, 5000 if path.stat().st_size > 5000 else 100)
        with pytest.raises(CheckpointError, match="cannot be read"):
            for name in file.keys():  # noqa: SIM118 - not a mapping
                file.get_tensor(name)
