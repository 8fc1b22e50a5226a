"""One GGUF file: what it says of itself and where its tensors lie, distrusted, and the numbers when they are asked for.

Format: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3, little endian. The package gguf knows the quantised
types and turns their blocks into numbers; its own reader believes every length that a file claims, so the header is
read here.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardforge.checkpoint.tensorheader import DAMAGED
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.core.optional import require
from shardforge.families.source import Info

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
LONGEST, DIMS, ALIGNMENT = 1 << 16, 4, 32  # bytes of a name; dimensions; bytes between tensors unless the file says
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that are stored as they are; all others are blocks of numbers with a scale, and come as float32."""


@dataclass(frozen=True)
class Stored:
    """One tensor: its type in the words of the format, its shape as torch has it, and its bytes in the file."""

    type: str
    shape: tuple[int, ...]
    begin: int
    bytes: int
    code: int


class GgufFile:
    """See `families.linked.Tensors`. `said` are the settings in the file, "general.architecture" and the like.

    CheckpointError or Problems for a file whose header contradicts itself or the file's length, before anything of the
    size that it claims is made. LaunchError without the package gguf.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise CheckpointError("this is no regular file", path, "name a file *.gguf")
        self._gguf = require("gguf", for_="reading GGUF", extra="gguf")
        with path.open("rb") as file:
            cursor = _Cursor(file, path)
            self.version, tensors, settings = cursor.begin()
            self.said = dict(cursor.settings(settings))
            slots = [self._slot(cursor) for _ in range(tensors)]
            here, size = cursor.at, cursor.size
        if (split := self.said.get("split.count", 0)) > 1:
            raise CheckpointError(f"this is one of {split} files of a model", path, "join them: gguf-split --merge")
        align = self.said.get("general.alignment", ALIGNMENT)
        if type(align) is not int or align <= 0 or align & (align - 1):
            raise CheckpointError(f"general.alignment={align!r} is no power of two", path, DAMAGED)
        first = -(-here // align) * align
        self.stored = {
            name: Stored(each.type, each.shape, each.begin + first, each.bytes, each.code) for name, each in slots
        }
        if problems := list(self._wrong([name for name, _ in slots], align, first, size)):
            raise Problems(problems[:8], str(path))
        self.names = {name: Info(each.shape, self._dtype(each.type)) for name, each in self.stored.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised to float32 where it is quantised."""
        slot = self.stored[name]
        with self.path.open("rb") as file:
            file.seek(slot.begin)
            raw = bytearray(slot.bytes)
            if file.readinto(raw) != slot.bytes:
                raise CheckpointError(f"{name} ends behind the end of the file", self.path, DAMAGED)
        if slot.type in PLAIN:
            return torch.frombuffer(raw, dtype=PLAIN[slot.type]).view(slot.shape)
        import numpy

        blocks = numpy.frombuffer(raw, numpy.uint8).reshape(*slot.shape[:-1], -1)
        try:
            numbers = self._gguf.dequantize(blocks, self._gguf.GGMLQuantizationType(slot.code))
        except NotImplementedError as cause:
            what = f"{name} is {slot.type}, which the package gguf does not dequantise"
            raise CheckpointError(what, self.path, "quantise the model to another type, like Q8_0 or F16") from cause
        return torch.from_numpy(numbers.astype(numpy.float32, copy=False)).view(slot.shape)

    def _dtype(self, kind: str) -> str:
        return str(PLAIN.get(kind, torch.float32)).removeprefix("torch.")

    def _slot(self, cursor: _Cursor) -> tuple[str, Stored]:
        """The next entry of the table; its place is counted from the first tensor."""
        name, dims = cursor.name(), cursor.number("I")
        if dims > DIMS:
            raise cursor.wrong(f"{name!r} has {dims} dimensions, {DIMS} are the most")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dims)]))
        code, begin = cursor.number("I"), cursor.number("Q")
        try:
            kind = self._gguf.GGMLQuantizationType(code)
        except ValueError:
            raise cursor.wrong(f"{name!r} has type {code}, which the package gguf does not know") from None
        numbers, size = self._gguf.GGML_QUANT_SIZES[kind]
        if not prod(shape) or not shape or shape[-1] % numbers:
            raise cursor.wrong(f"{name!r} {list(shape)} cannot be {kind.name}, whose blocks have {numbers} numbers")
        return name, Stored(kind.name, shape, begin, prod(shape) // numbers * size, code)

    def _wrong(self, names: list[str], align: int, first: int, size: int) -> Iterator[ForgeError]:
        for name, times in Counter(names).items():
            if times > 1:
                yield CheckpointError(f"{name!r} stands there {times} times", self.path, DAMAGED)
        ordered = sorted(self.stored.items(), key=lambda each: each[1].begin)
        for name, slot in ordered:
            if (slot.begin - first) % align:
                yield CheckpointError(f"{name} begins at {slot.begin}, no multiple of {align}", self.path, DAMAGED)
            if slot.begin + slot.bytes > size:
                what = f"{name} ends at byte {slot.begin + slot.bytes}, the file has {size}"
                yield CheckpointError(what, self.path, "the file is cut off: get it again")
        for (before, one), (name, other) in pairwise(ordered):
            if one.begin + one.bytes > other.begin:
                yield CheckpointError(f"{name} begins inside of {before}", self.path, DAMAGED)


class _Cursor:
    """Reads on through a header. No length is believed that the rest of the file is too short for."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.at, self.size = 0, path.stat().st_size

    def begin(self) -> tuple[int, int, int]:
        """Version, tensors, settings."""
        if self.take(len(MAGIC)) != MAGIC:
            raise self.wrong("it does not begin with GGUF")
        version = self.number("I")
        if version not in VERSIONS:
            raise CheckpointError(f"this is GGUF version {version}, read are 2 and 3", self.path, "convert it again")
        tensors, settings = self.number("Q"), self.number("Q")
        self.room(tensors, 24, "tensors")
        self.room(settings, 13, "settings")
        return version, tensors, settings

    def settings(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(count):
            name = self.name()
            if name in seen:
                raise self.wrong(f"{name!r} stands there twice")
            seen.add(name)
            yield name, self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text(self.size)
        if kind != LIST:
            return self.number(self._scalar(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner == TEXT:
            self.room(count, 8, "texts")
            return [self.text(self.size) for _ in range(count)]
        code = self._scalar(inner)
        self.room(count, struct.calcsize(code), "numbers")
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))

    def text(self, longest: int) -> str:
        length = self.number("Q")
        if length > longest:
            raise self.wrong(f"a text of {length} bytes is longer than {longest}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.wrong("a text is no UTF-8") from None

    def name(self) -> str:
        found = self.text(LONGEST)
        if not found.isprintable():
            raise self.wrong(f"the name {found!r} has characters that cannot be shown")
        return found

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def take(self, count: int) -> bytes:
        self.room(count, 1, "bytes")
        self.at += count
        return self.file.read(count)

    def room(self, count: int, size: int, what: str) -> None:
        if count * size > self.size - self.at:
            raise self.wrong(f"{count} {what} are claimed, and the file ends {self.size - self.at} bytes behind")

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"byte {self.at}: {what}", self.path, DAMAGED)

    def _scalar(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.wrong(f"a setting has type {kind}, which is none of one level")
        return SCALARS[kind]
