"""The model of a source whose weights come into memory one part at a time and go again, for computing without training.

It computes what `model.decoder.Decoder` does in evaluation, on the CPU, for whole sequences of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.core.errors import CheckpointError, Problems
from shardforge.core.units import bytes_
from shardforge.families.memory import free
from shardforge.families.section import config
from shardforge.families.source import Source
from shardforge.model.build import build
from shardforge.nn.batch import IGNORE, Batch
from shardforge.nn.sequence import Sequence

EMBED, NORM, HEAD, MTP = "embed", "norm", "head", "mtp"
TABLE = "embed.weight"
CHUNK_BYTES = 1 << 26
"""Of a head's table that is turned into numbers to compute with, at a time."""


class Streamed:
    """Parts are "embed", "blocks.0", ..., "norm", "head", and "mtp" where there is one.

    `tokens` [b, s] int64 are all that it will be asked about. Memory is that of one part in `dtype`, and of one weight
    as it is stored; of the embedding and the head only the rows in question are held in `dtype`. CheckpointError when
    that is more than there is, or when the source lacks a weight of its model.
    """

    def __init__(self, source: Source, tokens: Tensor, dtype: torch.dtype = torch.float32):
        self.source, self.dtype = source, dtype
        section = {**source.model, "core": {"kind": "eager"}}  # the one that needs no device and no build
        self.model = build(config(section, source.path), nn.Identity(), dtype).eval()
        self.weights = {name: tuple(each["shape"]) for name, each in state.table(self.model).items()}
        if missing := [name for name in self.weights if name not in source.names]:
            problems = [CheckpointError(f"{name} {list(self.weights[name])} is missing") for name in missing]
            raise Problems(problems, f"the weights in {source.path}")
        self._empty: dict[str, Tensor] = {name: getattr(*self._owner(name)) for name in self.weights}
        operand = self.model.head.operand()
        self.head = next(name for name, weight in self.model.named_parameters() if weight is operand)
        self.layers = len(self.model.blocks)
        self._room()
        self.rows, self.index = tokens.unique(return_inverse=True)
        self.seq = self._sequence(tokens.shape[1])

    def part(self, name: str) -> list[str]:
        """The weights and what else is remembered of a part."""
        return [each for each in self.weights if each.startswith(f"{name}.")]

    def module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    @contextmanager
    def held(self, part: str, read: Callable[[str], Tensor] | None = None) -> Iterator[None]:
        """The part can compute inside; `read` brings its weights in place of the source."""
        names = self.part(part)
        try:
            for name in names:
                self._put(name, (read or self.source.read)(name))
            yield
        finally:
            for name in names:
                self.drop(name)

    def now(self, name: str) -> Tensor:
        """A weight of a part that is held, in the type that it computes in."""
        return getattr(*self._owner(name))

    def drop(self, name: str) -> None:
        """Give the memory of a weight back before its part is done."""
        self._set(name, self._empty[name])

    @contextmanager
    def embedding(self, read: Callable[[str], Tensor] | None = None) -> Iterator[None]:
        """As `held`, for the embedding, of whose table only the rows of the tokens stay."""
        take = read or self.source.read
        with self.held(EMBED, lambda name: take(name)[self.rows] if name == TABLE else take(name)):
            yield

    def embedded(self, row: int = 0) -> Tensor:
        """The vectors of one sequence [1, s, h], where the embedding is held."""
        return self.model.embed(self.index[row : row + 1], self.seq)

    def block(self, layer: int, x: Tensor) -> Tensor:  # [1, s, h] -> [1, s, h]
        return self.model.blocks[str(layer)](x, self.seq)

    def norm(self, x: Tensor) -> Tensor:  # [..., h] -> [..., h]
        return self.model.norm(x)

    def logits(self, x: Tensor, table: Tensor) -> Iterator[Tensor]:
        """Of what the norm made [..., h], the head's logits [..., c] for some rows of its table after the others.

        `table` is the weight `head` as it is stored.
        """
        rows = max(1, CHUNK_BYTES // (table.shape[1] * self.dtype.itemsize))
        for some in table.split(rows):
            yield self.model.head.curve(x @ _copied(some, self.dtype).mT)

    def further(self, x: Tensor, normed: Tensor, row: int = 0) -> Iterator[Tensor]:
        """What each module of `mtp` hands to the head [1, s, h]; embedding and mtp are held. `x` [1, s, h] as the last
        block leaves it, and behind the norm."""
        index, place = self.index[row : row + 1], self.seq.positions
        labels = torch.cat([index[:, 1:], torch.full_like(index[:, :1], IGNORE)], 1)
        batch = Batch(index, labels, place, self.seq.documents, self.seq.rows)
        seq = replace(self.seq, ahead=batch.look_ahead(self.model.ahead).ahead)
        assert self.model.mtp is not None, "this model predicts no further tokens"
        for vectors, _ in self.model.mtp(x, normed, seq):
            yield vectors

    def _sequence(self, length: int) -> Sequence:
        place = torch.arange(length)[None]
        seq = Sequence(place, torch.zeros_like(place), torch.zeros(1, dtype=torch.int64), dtype=self.dtype)
        for module in self.model.modules():
            if prepare := getattr(module, "prepare", None):
                prepare(seq)
        return seq

    def _room(self) -> None:
        tables = {TABLE, self.head}
        parts = [f"blocks.{layer}" for layer in range(self.layers)] + [MTP]
        sizes = {part: self._bytes(name for name in self.part(part) if name not in tables) for part in parts}
        largest, left = max(sizes, key=lambda part: sizes[part]), free()
        if sizes[largest] > left:
            what = f"{largest} takes {bytes_(sizes[largest])} to compute with, and {bytes_(left)} of memory are free"
            raise CheckpointError(what, self.source.path, "free memory, or leave out what computes with the model")

    def _bytes(self, names: Iterator[str]) -> int:
        return sum(prod(self.weights[name]) * self.dtype.itemsize for name in names)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        prefix, _, leaf = name.rpartition(".")
        return self.model.get_submodule(prefix), leaf

    def _put(self, name: str, tensor: Tensor) -> None:
        numbers = _copied(tensor, self._empty[name].dtype)
        weight = isinstance(self._empty[name], nn.Parameter)
        self._set(name, nn.Parameter(numbers, requires_grad=False) if weight else numbers)

    def _set(self, name: str, tensor: Tensor) -> None:
        module, leaf = self._owner(name)
        if isinstance(tensor, nn.Parameter):
            module._parameters[leaf] = tensor
        else:
            module._buffers[leaf] = tensor


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In memory of its own: products of numbers that lie in a file's pages depend on where these begin."""
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
