"""The header of a safetensors file, distrusted: all of it is checked before a number is read or a buffer made.

Format: 8 bytes, the length of a JSON table; the table, name -> {"dtype", "shape", "data_offsets"}; then the numbers
(github.com/huggingface/safetensors, README). The library that maps the numbers takes the last of two equal names and
names no tensor in its errors; this reads nothing but the table and says which tensor is wrong.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError

PREFIX = 8
LIMIT = 100_000_000
"""Bytes of the longest header: the limit of the reference implementation."""
BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of a number of each type that the format knows."""
DIMS = 64  # of a tensor, as torch has it
SHOWN, CUT = 6, 60
DAMAGED = "it is damaged, or was made to deceive: get it again from where it came from"


@dataclass(frozen=True)
class Slot:
    """One tensor in a file: its type in the words of the format, and its bytes counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def header(path: Path) -> Mapping[str, Slot]:
    """Name -> place of every tensor of a safetensors file; no byte behind the header is read.

    CheckpointError unless the places are those of their types and shapes, and fill the file without overlap or hole.
    A file that did not change is checked once.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError("this is no regular file", path, "name a file of tensors")
    return _header(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=1024)
def _header(path: Path, size: int, changed: int, node: int) -> Mapping[str, Slot]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        if size < PREFIX:
            raise CheckpointError(f"{size} bytes are too few for a safetensors file", path, DAMAGED)
        if length > min(size - PREFIX, LIMIT):
            what = f"its header claims {length} bytes, the file has {size}, and {LIMIT} are the most that is allowed"
            raise CheckpointError(what, path, DAMAGED)
        table = mapping(file.read(length), path)
    table.pop("__metadata__", None)
    slots: dict[str, Slot] = {}
    faults: list[str] = []
    for name, value in table.items():
        try:
            slots[name] = _slot(name, value)
        except ValueError as cause:
            faults.append(f"{name!r}: {cause}")
    if not faults:
        faults += _gaps(slots, size - PREFIX - length)
    if faults:
        more = [f"and {len(faults) - SHOWN} more"] if len(faults) > SHOWN else []
        raise CheckpointError("; ".join([*faults[:SHOWN], *more]), path, DAMAGED)
    return slots


def mapping(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON table in which no name stands twice. CheckpointError when it is none."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as cause:
        raise CheckpointError(f"cannot be read as JSON: {cause or 'nested too deep'}", path, DAMAGED) from cause
    if not isinstance(found, dict):
        raise CheckpointError(f"expected a JSON table, got a {type(found).__name__}", path, DAMAGED)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def _slot(name: str, value: Any) -> Slot:
    if not name.isprintable():
        raise ValueError("its name has characters that cannot be shown")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry is not one of dtype, shape and data_offsets")
    dtype, shape, places = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"its type is {dtype!r}, known are {', '.join(BITS)}")
    if not _counts(shape, DIMS) or not _counts(places, 2) or len(places) != 2:
        raise ValueError(
            f"shape {_cut(shape)} and data_offsets {_cut(places)} are not {DIMS} and 2 whole numbers at most"
        )
    begin, end = places
    bits = prod(shape) * BITS[dtype]
    if end < begin or (end - begin) * 8 != bits:
        raise ValueError(f"{dtype}{shape} has {-(-bits // 8)} bytes, data_offsets {places} hold {end - begin}")
    return Slot(dtype, tuple(shape), begin, end)


def _counts(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= CUT else text[:CUT] + "..."


def _gaps(slots: Mapping[str, Slot], size: int) -> Iterator[str]:
    """Where the tensors do not fill the `size` bytes behind the header one after another."""
    ordered = [("the header", 0, 0)]
    ordered += sorted(((name, each.begin, each.end) for name, each in slots.items()), key=lambda each: each[1:])
    for (before, _, end), (name, begin, _) in pairwise(ordered):
        if begin < end:
            yield f"{name} begins at {begin}, inside of {before}, which ends at {end}"
        elif begin > end:
            yield f"{name} begins at {begin}, {begin - end} bytes behind the end of {before}"
    last, _, end = ordered[-1]
    if end != size:
        yield f"{last} ends at byte {end} of the numbers, the file has {size} of them"


def leads_out(file: Path, folder: Path) -> Path | None:
    """Where a link in a folder leads to outside of it; None for a file that lies there, or a link inside.

    The cache of Hugging Face keeps files in `blobs` beside `snapshots/REVISION`, which links to them: that is inside.
    """
    if not file.is_symlink():
        return None
    there, here = Path(os.path.realpath(file)), Path(os.path.realpath(folder))
    blobs = here.parent.parent / "blobs" if here.parent.name == "snapshots" else None
    return None if there.is_relative_to(here) or there.parent == blobs else there
