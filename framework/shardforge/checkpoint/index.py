"""index.json: where every piece of every tensor of a checkpoint lies. Plain JSON, distrusted when read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shardforge.checkpoint.folders import DAMAGED
from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.core.errors import CheckpointError

NAME = "index.json"
FORMAT = 1
SHOWN = 8


@dataclass(frozen=True)
class Chunk:
    """A box of one tensor and the place of its numbers: tensor `key` of safetensors file `file`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    """One whole tensor; its chunks cover it exactly once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def numbers(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numbers * TYPES[self.dtype][0].itemsize


def file_name(rank: int, part: int) -> str:
    """0, 0 -> "rank-00000.safetensors"; 0, 2 -> "rank-00000-2.safetensors"."""
    return f"rank-{rank:05d}{f'-{part}' if part else ''}.safetensors"


def is_file_name(name: object) -> bool:
    """Whether `name` is one that `file_name` gives: no folder, no way out of the checkpoint."""
    return isinstance(name, str) and re.fullmatch(r"rank-\d{5,}(-[1-9]\d*)?\.safetensors", name, re.ASCII) is not None


def to_json(index: Mapping[str, Entry]) -> bytes:
    tensors = {
        name: {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "chunks": [
                {"offsets": chunk.offsets, "sizes": chunk.sizes, "file": chunk.file, "key": chunk.key}
                for chunk in entry.chunks
            ],
        }
        for name, entry in sorted(index.items())
    }
    return json.dumps({"format": FORMAT, "tensors": tensors}, separators=(",", ":")).encode()


def read(folder: Path) -> dict[str, Entry]:
    """The index of a checkpoint folder. Raises CheckpointError for anything that this program does not write."""
    path = folder / NAME
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"the index cannot be read: {cause}", path, DAMAGED) from cause
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"index format is {found!r}, this version reads {FORMAT}", path, "update ShardForge")
    tensors = document.get("tensors")
    if not isinstance(tensors, dict):
        raise CheckpointError("the index has no table of tensors", path, DAMAGED)
    index: dict[str, Entry] = {}
    faults: list[str] = []
    for name, value in tensors.items():
        try:
            index[name] = _entry(value)
            fault = _fault(index[name], folder)
        except (KeyError, TypeError, ValueError) as cause:
            fault = f"unreadable entry ({type(cause).__name__}: {cause})"
        if fault:
            faults.append(f"{name}: {fault}")
    if faults:
        raise CheckpointError(f"{len(faults)} entries of the index are wrong:\n{shorten(faults)}", path, DAMAGED)
    return index


def shorten(lines: Sequence[str]) -> str:
    """The first lines of a long list, and how many more there are."""
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(f"      {line}" for line in [*lines[:SHOWN], *more])


def _entry(value: Mapping[str, Any]) -> Entry:
    chunks = tuple(
        Chunk(_numbers(chunk["offsets"]), _numbers(chunk["sizes"]), chunk["file"], chunk["key"])
        for chunk in value["chunks"]
    )
    return Entry(value["dtype"], _numbers(value["shape"]), chunks)


def _numbers(values: Iterable[object]) -> tuple[int, ...]:
    out = []
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is not a size")
        out.append(value)
    return tuple(out)


def _fault(entry: Entry, folder: Path) -> str:
    """What is wrong with one entry, or nothing."""
    if entry.dtype not in TYPES:
        return f"type {entry.dtype!r} is unknown"
    for chunk in entry.chunks:
        if not is_file_name(chunk.file) or (folder / chunk.file).is_symlink():
            return f"{chunk.file!r} is not a file of this folder"
        if not isinstance(chunk.key, str):
            return f"key {chunk.key!r} is not text"
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.shape):
            return f"a chunk has {len(chunk.sizes)} dimensions, the tensor {len(entry.shape)}"
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True):
            if offset + size > whole:
                return f"a chunk reaches {offset + size} in a dimension of {whole}"
    covered = sum(prod(chunk.sizes) for chunk in entry.chunks)
    if covered != prod(entry.shape) or len({chunk.offsets for chunk in entry.chunks}) != len(entry.chunks):
        return f"its chunks hold {covered} numbers, the tensor {prod(entry.shape)}, each must come once"
    return ""


def differences(entries: Mapping[str, Entry], tensors: Mapping[str, Any], elsewhere: Collection[str] = ()) -> list[str]:
    """What keeps `tensors` from being filled from `entries`, a line each. Parts nobody asks for do not count, nor what
    other ranks ask for: the names `elsewhere`."""
    parts = {name.partition(".")[0] for name in tensors}
    lines = []
    for name in sorted(tensors.keys() | {name for name in entries if name.partition(".")[0] in parts}):
        entry, wanted = entries.get(name), tensors.get(name)
        if wanted is None and name in elsewhere:
            continue
        was = f"{list(entry.shape)} {entry.dtype}" if entry else "absent"
        now = "absent" if wanted is None else f"{list(wanted.shape)} {type_name(wanted.dtype)}"
        if was != now:
            lines.append(f"{name}: {was} in the checkpoint, {now} here")
    return lines
