"""The tensors of one file, made of a source's weights one group at a time, with a hash of everything that passes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import BLOCK_BYTES, TYPES, Part, raw
from shardforge.convert.format import Item
from shardforge.core.errors import CheckpointError
from shardforge.families.forms import SAME
from shardforge.families.source import Source


class Pieces:
    """Parts for `Writer.write`. Afterwards, by name: `weights`, the hash of what was read of the source; `tensors`,
    that of what was written; `odd`, how many numbers are not finite, where any are."""

    def __init__(self, source: Source):
        self.source = source
        self.weights: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.odd: dict[str, int] = {}
        self._group: tuple[Any, list[Tensor]] | None = None
        self._hasher = ThreadPoolExecutor(1, "convert-hash")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown(wait=True, cancel_futures=error is not None)

    def part(self, item: Item) -> Part:
        return Part(item.key, item.dtype, item.shape, partial(self.make, item), partial(self.digest, item))

    def found(self) -> dict[str, Any]:
        """What was found out, once all parts are written."""
        self._settle()
        return {"weights": self.weights, "tensors": self.tensors, "odd": self.odd}

    def make(self, item: Item) -> Tensor:
        """The numbers of `item`. What was made before may be gone."""
        self._settle()
        dtype = TYPES[item.dtype][0]
        if item.form == SAME:
            whole = self._read(item.ours[0], item.kind)
            read = self._place(item.ours[0], item.kind)
            if whole.dtype == dtype:
                return self._hashed(self._checked(whole, item), read, (item.key, self.tensors))
            self._hashed(whole, read)
        else:
            whole = self._made(item)
        made = self._checked(whole.to(dtype).contiguous(), item)
        if made.dtype != whole.dtype:
            self._count(item.key, made)
        return self._hashed(made, (item.key, self.tensors))

    def digest(self, item: Item) -> str:
        """The SHA-256 of what `make` gave."""
        self._settle()
        return self.tensors[item.key]

    def _made(self, item: Item) -> Tensor:
        """Part `item.part` of its group, of which all parts are made at once."""
        key = item.ours, item.kind, item.form
        if self._group is None or self._group[0] != key:
            self._group = None
            ours = [self._hashed(self._read(name, item.kind), self._place(name, item.kind)) for name in item.ours]
            self._group = key, list(item.form.theirs(ours))
            self._settle()  # a hash keeps what it reads in memory
        parts = self._group[1]
        if len(parts) == 1:
            self._group = None
        return parts[item.part]

    def _read(self, name: str, kind: str) -> Tensor:
        whole = (self.source.read_moment(kind, name) if kind else self.source.read(name)).contiguous()
        self._count(label(name, kind), whole)
        return whole

    def _checked(self, made: Tensor, item: Item) -> Tensor:
        if made.shape != torch.Size(item.shape):
            what = f"{item.key} became {list(made.shape)}, {list(item.shape)} was planned"
            raise CheckpointError(what, self.source.path, "report this with the model's settings")
        return made

    def _place(self, name: str, kind: str) -> tuple[str, dict[str, str]]:
        return label(name, kind), self.weights

    def _hashed(self, tensor: Tensor, *places: tuple[str, dict[str, str]]) -> Tensor:
        """The tensor, whose hash comes to be in each of `places` while others work on."""
        self._waiting.append(self._hasher.submit(_hash, tensor, places))
        return tensor

    def _count(self, name: str, tensor: Tensor) -> None:
        if count := not_finite(tensor):
            self.odd[name] = count

    def _settle(self) -> None:
        for each in self._waiting:
            each.result()
        self._waiting.clear()


def label(name: str, kind: str) -> str:
    """What a weight, or what the optimizer keeps for it, is called in a certificate: as in a ShardForge checkpoint."""
    return f"optim.{name}.{kind}" if kind else f"model.{name}"


def not_finite(tensor: Tensor) -> int:
    """How many numbers are NaN or infinite; one quick pass where none is."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    wide = tensor.float() if tensor.itemsize == 1 else tensor
    low, high = torch.aminmax(wide)
    if torch.isfinite(low) and torch.isfinite(high):
        return 0
    flat = wide.reshape(-1)
    steps = range(0, flat.numel(), BLOCK_BYTES)
    return sum(int((~torch.isfinite(flat[start : start + BLOCK_BYTES])).sum()) for start in steps)


def _hash(tensor: Tensor, places: Sequence[tuple[str, dict[str, str]]]) -> None:
    digest = hashlib.sha256(raw(tensor)).hexdigest()
    for name, table in places:
        table[name] = digest
