"""Write safetensors files one block at a time, hashed on the way, and small files that are whole or absent."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardforge.checkpoint.tensorheader import header
from shardforge.checkpoint.tensormap import TensorMap
from shardforge.core.errors import CheckpointError

BLOCK_BYTES = 1 << 24
READ_BYTES = 1 << 20
BEHIND_BYTES = 1 << 26
"""Bytes of a file that may wait in the page cache. They go to the disk while the next ones are made, and their pages
serve again: new pages cost more than the copy into them, and would drive out what others have cached."""

TYPES: dict[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "F64"),
    "int64": (torch.int64, "I64"),
    "float32": (torch.float32, "F32"),
    "int32": (torch.int32, "I32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "int16": (torch.int16, "I16"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}
"""Number types a checkpoint can hold: our name -> torch type, name in a safetensors header."""


TREE = "tree:"
STORED = {theirs: dtype for dtype, theirs in TYPES.values()}


@dataclass(frozen=True)
class Part:
    """A tensor to be written: `read` brings its numbers when their turn comes. `digest` says, after that, what the
    SHA-256 of their bytes is; without it the writer finds out."""

    key: str
    dtype: str  # a key of TYPES
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    digest: Callable[[], str] | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * TYPES[self.dtype][0].itemsize


@dataclass(frozen=True)
class Written:
    """A finished file. `sha256` is a tree: TREE and the SHA-256 of those, in hexadecimal and in their order, of the
    header and of each tensor: bytes that are hashed as a tensor are not hashed again as a file."""

    file: str
    bytes: int
    sha256: str


def type_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def write_tensors(path: Path, parts: Sequence[Part], metadata: Mapping[str, str] | None = None) -> Written:
    """Write `parts` as one safetensors file on the disk itself (fsync); holds one tensor's copy at most in memory.

    The hash is of the bytes as they left memory, so that a later audit sees what the disk did to them. `metadata` is
    what the header says of the file itself, like {"format": "pt"}.
    """
    parts = sorted(parts, key=lambda part: -TYPES[part.dtype][0].itemsize)  # keeps every tensor aligned in the file
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for part in parts:
        end = start + part.bytes
        table[part.key] = {"dtype": TYPES[part.dtype][1], "shape": part.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digests = [hashlib.sha256(head).hexdigest()]
    with path.open("xb") as file, ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
        put(file, head)
        behind = 0
        for part in parts:
            behind, digest = _write(file, part, hasher, behind)
            digests.append(digest)
        _settle(file)
    return Written(path.name, len(head) + start, _tree(digests))


def _write(file: BinaryIO, part: Part, hasher: ThreadPoolExecutor, behind: int) -> tuple[int, str]:
    """Bytes that wait in the page cache, of which `behind` did before, and the SHA-256 of the tensor."""
    digest = hashlib.sha256()
    for block in _blocks(part):
        hashed = None if part.digest else hasher.submit(digest.update, block)
        put(file, block)
        behind += len(block)
        if behind >= BEHIND_BYTES:
            _drain(file)
            behind = 0
        if hashed:
            hashed.result()
        del block, hashed  # they hold the tensor, and the next one is made now
    return behind, part.digest() if part.digest else digest.hexdigest()


def _tree(digests: Sequence[str]) -> str:
    return TREE + hashlib.sha256("".join(digests).encode()).hexdigest()


def put(file: BinaryIO, block: bytes | memoryview) -> None:
    """The one place where tensor bytes go to the disk; tests make it fail."""
    file.write(block)


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file that is there completely or not at all, whenever the process or the machine dies."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        file.write(content)
        _settle(file)
    os.replace(beside, path)
    settle_folder(path.parent)


def settle_folder(path: Path) -> None:
    """Make new names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU. The view and every slice of it keep the tensor alive: whoever works
    on one beside an error that ends everything else works on memory that is still there."""
    # not tensor.numpy(), after which torch refuses to resize the storage for the rest of its life
    numbers: Any = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    numbers.tensor = tensor
    return memoryview(numbers)


def sha256(path: Path, like: str = "") -> str:
    """Of a file as a whole, or as a tree where `like` is one. CheckpointError for a tree of a file without a header."""
    with path.open("rb") as file:
        if not like.startswith(TREE):
            return hashlib.file_digest(file, "sha256").hexdigest()
        slots = sorted(header(path).values(), key=lambda slot: slot.begin)
        start = 8 + int.from_bytes(file.read(8), "little")
        spans = [(0, start), *((start + slot.begin, start + slot.end) for slot in slots)]
        return _tree([_span(file, begin, end) for begin, end in spans])


def as_written(path: Path, told: str) -> bool:
    """Whether a file, read to its last byte, is the one that `told` is the hash of."""
    try:
        return sha256(path, told) == told
    except CheckpointError:
        return False


def _span(file: BinaryIO, begin: int, end: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_BYTES, end - begin)))
    file.seek(begin)
    while begin < end:
        count = file.readinto(buffer[: end - begin])  # type: ignore[attr-defined]
        if not count:
            break
        digest.update(buffer[:count])
        begin += count
    return digest.hexdigest()


def opened(path: Path) -> TensorMap:
    """A safetensors file for reading; close it, or use it in a `with`."""
    return TensorMap(path, STORED)


def _blocks(part: Part) -> Iterator[memoryview]:
    tensor = part.read().detach()
    found = type_name(tensor.dtype), tuple(tensor.shape)
    assert found == (part.dtype, part.shape), f"{part.key}: planned {part.dtype}{part.shape}, found {found}"
    tensor = tensor.cpu().contiguous()
    numbers = raw(tensor)
    for start in range(0, len(numbers), BLOCK_BYTES):
        yield numbers[start : start + BLOCK_BYTES]
    del tensor, numbers  # before the next one is made


def _drain(file: BinaryIO) -> None:
    """Bring what is written to the disk and give its pages back."""
    _settle(file)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
