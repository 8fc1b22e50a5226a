"""Write safetensors files one block at a time, hashed on the way, and small files that are whole or absent."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardforge.checkpoint.tensormap import TensorMap

BLOCK_BYTES = 1 << 24
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


STORED = {theirs: dtype for dtype, theirs in TYPES.values()}


@dataclass(frozen=True)
class Part:
    """A tensor to be written: `read` brings its numbers when their turn comes."""

    key: str
    dtype: str  # a key of TYPES
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * TYPES[self.dtype][0].itemsize


@dataclass(frozen=True)
class Written:
    """A finished file."""

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
    digest, waiting = hashlib.sha256(), 0
    with path.open("xb") as file, ThreadPoolExecutor(1, "checkpoint-hash") as hasher:
        for block in chain([len(text).to_bytes(8, "little") + text], _blocks(parts)):
            hashed = hasher.submit(digest.update, block)
            put(file, block)
            waiting += len(block)
            if waiting >= BEHIND_BYTES:
                _drain(file)
                waiting = 0
            hashed.result()
            del block, hashed  # they hold the tensor, and the next one is made now
        _settle(file)
    return Written(path.name, 8 + len(text) + start, digest.hexdigest())


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


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def opened(path: Path) -> TensorMap:
    """A safetensors file for reading; close it, or use it in a `with`."""
    return TensorMap(path, STORED)


def _blocks(parts: Sequence[Part]) -> Iterator[Any]:
    for part in parts:
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
