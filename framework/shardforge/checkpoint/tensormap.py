"""One safetensors file for reading: each tensor is mapped by itself, so that a file may be larger than memory."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from shardforge.checkpoint.tensorheader import DAMAGED, PREFIX, Slot, header
from shardforge.core.errors import CheckpointError


@dataclass(frozen=True)
class Slice:
    """A tensor that is not read yet; what is cut out of it reads only its own pages."""

    file: TensorMap
    name: str
    slot: Slot

    def get_dtype(self) -> str:
        """In the words of the format, like "BF16"."""
        return self.slot.dtype

    def get_shape(self) -> list[int]:
        return list(self.slot.shape)

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.get_tensor(self.name)[index]


class TensorMap:
    """Tensors of a file by name, until it is closed; those that were got stay. `types` names the torch type of each
    type of the format. CheckpointError, before anything is mapped, for a file whose header is not sound."""

    def __init__(self, path: Path, types: Mapping[str, torch.dtype]):
        self.path, self._types = path, types
        self._slots = header(path)
        self._file: BinaryIO = path.open("rb")
        self._start = PREFIX + int.from_bytes(self._file.read(PREFIX), "little")

    def __enter__(self) -> TensorMap:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        return list(self._slots)

    def get_slice(self, name: str) -> Slice:
        return Slice(self, name, self._slot(name))

    def get_tensor(self, name: str) -> Tensor:
        """Whose numbers may be changed; the file stays as it is."""
        slot = self._slot(name)
        dtype = self._types.get(slot.dtype)
        if dtype is None:
            raise CheckpointError(f"{name} has the type {slot.dtype}, which torch lacks", self.path, "convert it")
        if slot.begin == slot.end:
            return torch.empty(slot.shape, dtype=dtype)
        begin = self._start + slot.begin
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        size = self._start + slot.end - page
        try:
            mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_COPY, offset=page)
        except ValueError as cause:  # the file is shorter than a moment ago
            raise CheckpointError(f"{name} cannot be read: {cause}", self.path, DAMAGED) from cause
        flat = torch.frombuffer(mapped, dtype=dtype, count=prod(slot.shape), offset=begin - page)
        return flat.view(slot.shape)

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            raise CheckpointError(f"tensor {name} is missing", self.path, DAMAGED)
        return self._slots[name]
