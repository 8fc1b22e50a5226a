from __future__ import annotations

import hashlib
import json
import os
import stat
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES, Part, write_tensors, write_whole


def part(key: str, numbers: torch.Tensor) -> Part:
    return Part(key, tensorfile.type_name(numbers.dtype), tuple(numbers.shape), lambda: numbers)


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = {name: torch.ones(3, 2).to(kind) for name, (kind, _) in TYPES.items()}
    write_tensors(tmp_path / "a", [part(key, numbers) for key, numbers in tensors.items()])
    found = load_file(tmp_path / "a")
    assert {key: (numbers.dtype, numbers.float().sum().item()) for key, numbers in found.items()} == {
        key: (numbers.dtype, 6.0) for key, numbers in tensors.items()
    }


def tree(content: bytes) -> str:
    """Of a file of tensors, in its own words."""
    start = 8 + int.from_bytes(content[:8], "little")
    slots = [slot["data_offsets"] for name, slot in json.loads(content[8:start]).items() if name != "__metadata__"]
    parts = [content[:start], *(content[start + begin : start + end] for begin, end in sorted(slots))]
    return "tree:" + hashlib.sha256("".join(hashlib.sha256(each).hexdigest() for each in parts).encode()).hexdigest()


def test_the_hash_is_that_of_header_and_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 100)
    monkeypatch.setattr(tensorfile, "READ_BYTES", 70)
    parts = [part("x", torch.randn(1000)), part("empty", torch.zeros(0)), part("y", torch.randn(3).double())]
    written = write_tensors(tmp_path / "a", parts, {"format": "pt"})
    content = (tmp_path / "a").read_bytes()
    assert (written.bytes, written.sha256) == (len(content), tree(content))
    assert tensorfile.as_written(tmp_path / "a", written.sha256)


def test_a_digest_that_is_known_is_not_computed_again(tmp_path):
    known = replace(part("x", torch.ones(3)), digest=lambda: "0" * 64)
    written = write_tensors(tmp_path / "a", [known])
    header = hashlib.sha256((tmp_path / "a").read_bytes()[:-12]).hexdigest()
    assert written.sha256 == "tree:" + hashlib.sha256((header + "0" * 64).encode()).hexdigest()


@pytest.mark.parametrize("at", [0, 7, 8, 20, -4001, -4000, -1])
def test_no_byte_can_change_unseen(tmp_path, at):
    written = write_tensors(tmp_path / "a", [part("y", torch.randn(3).double()), part("x", torch.randn(1000))])
    content = bytearray((tmp_path / "a").read_bytes())
    content[at] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert not tensorfile.as_written(tmp_path / "a", written.sha256)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"x", lambda content: b""])
def test_neither_can_its_length(tmp_path, change):
    written = write_tensors(tmp_path / "a", [part("x", torch.randn(1000))])
    (tmp_path / "a").write_bytes(change((tmp_path / "a").read_bytes()))
    assert not tensorfile.as_written(tmp_path / "a", written.sha256)


def test_the_hash_of_a_whole_file_is_one_too(tmp_path):
    """Manifests have them of other files, and of tensors those that were written before there were trees."""
    write_tensors(tmp_path / "a", [part("x", torch.randn(1000))])
    whole = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert tensorfile.as_written(tmp_path / "a", whole) and not tensorfile.as_written(tmp_path / "a", "0" * 64)


def test_a_long_file_is_drained_on_the_way(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 100)
    monkeypatch.setattr(tensorfile, "BEHIND_BYTES", 1000)
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, *rest: sizes.append(os.fstat(handle).st_size))
    written = write_tensors(tmp_path / "a", [part("x", torch.randn(1000))])
    assert len(sizes) >= 3 and max(after - before for before, after in pairwise([0, *sizes, written.bytes])) <= 1100
    assert written.sha256 == tree((tmp_path / "a").read_bytes())


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    write_tensors(tmp_path / "a", [part("b", torch.ones(3, dtype=torch.bool)), part("d", torch.ones(3).double())])
    header = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert header % 8 == 0
    assert b'"d":{"dtype":"F64","shape":[3],"data_offsets":[0,24]}' in (tmp_path / "a").read_bytes()


def test_an_existing_file_is_never_written_over(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", [part("x", torch.zeros(1))])


def test_only_one_tensor_is_fetched_at_a_time(tmp_path, monkeypatch):
    events: list[str] = []
    put = tensorfile.put

    def fetch(name: str) -> torch.Tensor:
        events.append(f"fetch {name}")
        return torch.zeros(1)

    def note(file, block):
        events.append("put")
        put(file, block)

    monkeypatch.setattr(tensorfile, "put", note)
    write_tensors(tmp_path / "a", [Part(name, "float32", (1,), lambda name=name: fetch(name)) for name in "xy"])
    assert events == ["put", "fetch x", "put", "fetch y", "put"]


def test_a_whole_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_call_returns(tmp_path, monkeypatch):
    events: list[str] = []
    replace = os.replace

    def note(source: Path, target: Path) -> None:
        events.append("name")
        replace(source, target)

    def fsync(handle: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "content")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", note)
    write_whole(tmp_path / "a", b"content")
    assert events == ["content", "name", "folder"]


def test_a_whole_file_is_never_seen_half_written(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def fail(handle: int) -> None:
        raise OSError(5, "disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk"):
        write_whole(tmp_path / "a", b"new content")
    assert (tmp_path / "a").read_bytes() == b"old"


def test_bytes_that_somebody_still_works_on_keep_their_tensor(tmp_path):
    tensor = torch.arange(1 << 20)
    gone = weakref.ref(tensor)
    block = tensorfile.raw(tensor)[8:16]
    del tensor
    assert gone() is not None and bytes(block) == (1).to_bytes(8, "little")
    del block
    assert gone() is None


def test_one_tensor_is_let_go_before_the_next_is_made(tmp_path):
    made: list[weakref.ref] = []

    def read() -> torch.Tensor:
        assert all(each() is None for each in made)
        tensor = torch.ones(1 << 10)
        made.append(weakref.ref(tensor))
        return tensor

    write_tensors(tmp_path / "file", [Part(f"t{at}", "float32", (1 << 10,), read) for at in range(3)])
    assert len(made) == 3
