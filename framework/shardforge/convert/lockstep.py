"""Source and target are computed side by side, one part of the model after the other, and compared after each.

A part of the target is given what the source's part was given, so what is wrong in one layer is seen in that layer
alone. Where `transformers` has computed one of the two, our part of that one is given its streams too. Where the
target's weights come into memory those of the source, still there, are compared with them and go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import TYPES
from shardforge.convert.distance import Gauge, Layer, Tolerance, gauged
from shardforge.convert.independent import Theirs
from shardforge.families.streamed import EMBED, MTP, NORM, TABLE, Streamed

PIECE = 1 << 24
LOGITS = "logits"
Apply = Callable[[Streamed, Tensor], Tensor]
Side = Literal["source", "target"]
Seen = Callable[[int, int], object]
"""(parts that are done, parts in all)"""


@dataclass
class Track:
    """One comparison on its way through the model."""

    what: str
    tolerance: Tolerance
    layers: list[Layer] = field(default_factory=list)

    def note(self, name: str, along: Gauge, alone: Gauge, *, mixed: bool = False) -> None:
        """`along`: both from the token ids on; `alone`: both from the same input; `mixed`: behind a mixture."""
        error = alone.error(self.tolerance.turned if mixed else 0.0)
        self.layers.append(Layer(name, along.max_abs, along.cosine, error))

    @property
    def first(self) -> Layer | None:
        """The first that leaves tolerance."""
        return next((layer for layer in self.layers if not layer.error <= self.tolerance.error), None)


class Lockstep:
    """`own` compares target and source, `other` ours with `theirs` of one `side`. `unequal` are weights that are not
    the source's after the cast, a line each, in the order of the model."""

    def __init__(self, source: Streamed, target: Streamed, own: Track, *, cast: bool):
        self.source, self.target, self.own, self.cast = source, target, own, cast
        self.other: Track | None = None
        self.unequal: list[str] = []
        self.weights = 0
        self._theirs: Theirs | None = None
        self._side = source

    def beside(self, theirs: Theirs, side: Side, track: Track) -> None:
        """Compare with an independent computation too."""
        dtype = self.source.dtype
        streams = tuple(stream.to(dtype) for stream in theirs.streams)
        self._theirs = replace(theirs, streams=streams, normed=theirs.normed.to(dtype))
        self._side, self.other = getattr(self, side), track

    @torch.no_grad()
    def run(self, seen: Seen | None = None) -> None:
        """`seen` is told after each part of the model."""
        seen, layers = seen or (lambda done, parts: None), self.source.layers
        x = self._embed()
        for layer in range(layers):
            part = f"blocks.{layer}"
            x = self._part(part, x, partial(_block, layer))
            seen(layer + 1, layers + 1)
        normed = self._part(NORM, x, lambda side, y: side.norm(y))
        self._head(normed)
        seen(layers + 1, layers + 1)
        if self.source.model.mtp is not None:
            self._further(x, normed)

    def _embed(self) -> Pair:
        tables = self.source.source.read(TABLE), self.target.source.read(TABLE)
        self._weigh(TABLE, *tables)
        with self.source.embedding(lambda name: tables[0] if name == TABLE else self.source.source.read(name)):
            a = self.source.embedded()
            with self.target.embedding(lambda name: tables[1] if name == TABLE else self._handed(name)):
                b = self.target.embedded()
        pair = Pair(a, b, self._theirs.streams[0] if self._theirs else None)
        self.own.note(EMBED, gauged(b, a), gauged(b, a))
        self._beside(EMBED, pair, pair.of(self._side is self.source))
        return pair

    def _part(self, part: str, x: Pair, apply: Apply) -> Pair:
        """Both sides' results of a block or of the norm."""
        ours = None
        with self.source.held(part):
            a = apply(self.source, x.source)
            if x.theirs is not None and self._side is self.source:
                ours = apply(self.source, x.theirs)
            with self.target.held(part, self._handed):
                alone = apply(self.target, x.source)
                b = alone if x.same else apply(self.target, x.target)
                if x.theirs is not None and self._side is self.target:
                    ours = apply(self.target, x.theirs)
        self.own.note(part, gauged(b, a), gauged(alone, a), mixed=self._mixed(part))
        pair = Pair(a, b, self._next(part))
        if ours is not None and pair.theirs is None:  # behind the last block they show what the norm makes of it
            return Pair(a, b, ours)
        if ours is not None:
            self._beside(part, pair, ours)
        return pair

    def _next(self, part: str) -> Tensor | None:
        """Their result of a part."""
        if self._theirs is None:
            return None
        if part == NORM:
            return self._theirs.normed
        streams, at = self._theirs.streams, int(part.rpartition(".")[2]) + 1
        return streams[at] if at < len(streams) else None

    def _beside(self, name: str, pair: Pair, ours: Tensor) -> None:
        if self.other is not None and pair.theirs is not None:
            along = gauged(pair.of(self._side is self.source), pair.theirs)
            self.other.note(name, along, gauged(ours, pair.theirs), mixed=self._mixed(name))

    def _head(self, x: Pair) -> None:
        a, b, of_source = self.source, self.target, self._side is self.source
        mine, yours = a.source.read(a.head), b.source.read(b.head)
        if b.head != TABLE:
            self._weigh(b.head, mine, yours)
        pieces = {"source": a.logits(x.source, mine), "alone": b.logits(x.source, yours)}
        if not x.same:
            pieces["target"] = b.logits(x.target, yours)
        if x.theirs is not None:
            pieces["theirs"] = self._side.logits(x.theirs, mine if of_source else yours)
        along, alone, far, near = (Gauge(x.source.shape[1]) for _ in range(4))
        first = 0
        for piece in zip(*pieces.values(), strict=True):
            now = dict(zip(pieces, piece, strict=True))
            now.setdefault("target", now["alone"])
            along.add(now["target"], now["source"])
            alone.add(now["alone"], now["source"])
            if self._theirs is not None:
                wanted = self._theirs.logits[..., first : first + now["source"].shape[-1]]
                far.add(now["source" if of_source else "target"], wanted)
                near.add(now["theirs"], wanted)
            first += now["source"].shape[-1]
        self.own.note(LOGITS, along, alone)
        if self.other is not None:
            self.other.note(LOGITS, far, near)

    def _further(self, x: Pair, normed: Pair) -> None:
        """The modules that predict further tokens, which transformers does not have."""
        a, b = self.source, self.target
        with a.embedding(), b.embedding(), a.held(MTP):
            wanted = list(a.further(x.source, normed.source))
            with b.held(MTP, self._handed):
                alone = list(b.further(x.source, normed.source))
                got = alone if normed.same else list(b.further(x.target, normed.target))
        for depth, (one, same, want) in enumerate(zip(got, alone, wanted, strict=True)):
            self.own.note(f"{MTP}.{depth}", gauged(one, want), gauged(same, want), mixed=self._mixed(MTP))

    def _mixed(self, part: str) -> bool:
        """Whether rounding can turn a choice; what their last block made is seen behind the norm."""
        parts = (part, f"blocks.{self.source.layers - 1}") if part == NORM else (part,)
        return any(".router." in name for each in parts for name in self.target.part(each))

    def _handed(self, name: str) -> Tensor:
        """The target's weight, in whose place in memory the source's was."""
        weight = self.target.source.read(name)
        self._weigh(name, self.source.now(name), weight)
        self.source.drop(name)
        return weight

    def _weigh(self, name: str, mine: Tensor, theirs: Tensor) -> None:
        """Compare a weight of the source, perhaps in a wider type by now, with that of the target."""
        self.weights += 1
        was, now = self.source.source.names[name].dtype, self.target.source.names[name].dtype
        if was != now and not self.cast:
            self.unequal.append(f"{name} is {was} in the source and {now} here, and no cast was asked for")
            return
        if told := difference(name, mine, theirs, TYPES[was][0]):
            self.unequal.append(told)


@dataclass(frozen=True)
class Pair:
    """The stream [1, s, h] at one place of the model: of the source, of the target, and theirs where it is known."""

    source: Tensor
    target: Tensor
    theirs: Tensor | None

    @property
    def same(self) -> bool:
        return torch.equal(self.source, self.target)

    def of(self, source: bool) -> Tensor:
        return self.source if source else self.target


def _block(layer: int, side: Streamed, x: Tensor) -> Tensor:
    return side.block(layer, x)


def difference(name: str, mine: Tensor, theirs: Tensor, was: torch.dtype) -> str:
    """`unequal` in words; "" for equal ones."""
    if mine.shape != theirs.shape:
        return f"{name} is {list(mine.shape)} in the source and {list(theirs.shape)} here"
    if not (found := unequal(mine, theirs, was)):
        return ""
    count, at, want, got = found
    more = f", the first of {count:,} numbers that differ" if count > 1 else ""
    return f"{name}[{', '.join(map(str, at))}] is {want:.6g} in the source and {got:.6g} here{more}"


def unequal(mine: Tensor, theirs: Tensor, was: torch.dtype) -> tuple[int, tuple[int, ...], float, float] | None:
    """(how many, where the first is, wanted, found) of numbers that are not what `mine`, stored as `was`, becomes in
    the type of `theirs`; None for equal ones. Numbers that are none are equal; 0 is not -0."""
    count, first = 0, None
    pairs = zip(mine.reshape(-1).split(PIECE), theirs.reshape(-1).split(PIECE), strict=True)
    for number, (want, got) in enumerate(pairs):
        want = want.to(was).to(got.dtype)
        if torch.equal(want, got) and torch.equal(want.signbit(), got.signbit()):
            continue
        apart = ((want != got) | (want.signbit() != got.signbit())) & ~(want.isnan() & got.isnan())
        count += int(apart.sum())
        if first is None and apart.any():
            at = int(apart.nonzero()[0])
            first = number * PIECE + at, float(want[at]), float(got[at])
    if first is None:
        return None
    index, want, got = first
    return count, tuple(int(each) for each in torch.unravel_index(torch.tensor(index), theirs.shape)), want, got
