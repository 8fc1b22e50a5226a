"""The part of a weight that one rank holds, read from a source whatever layout the rank belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardforge.families.shardforge import RunSource
from shardforge.families.source import Source
from shardforge.nn.init import held

Span = tuple[int, int, int]
"""(place here, place in the whole dimension, length) of neighbouring numbers."""


@torch.no_grad()
def fill(source: Source, name: str, target: Tensor, kind: str = "") -> None:
    """Put this rank's part of a weight into `target`, converted to its type; nobody is asked to take part. With `kind`
    it is a part of what the optimizer keeps for the weight.

    Of a ShardForge checkpoint, and of a weight that stands alone in a file, no more than that part is read.
    """
    mine = target._local_tensor if isinstance(target, DTensor) else target
    spans = [list(runs(index)) for index in held(target)]
    for offsets, numbers in boxes(source, name, kind):
        for box in product(*spans):
            cut = [overlap(*each) for each in zip(box, offsets, numbers.shape, strict=True)]
            if all(length for *_, length in cut):
                here = tuple(slice(at, at + length) for at, _, length in cut)
                there = tuple(slice(at, at + length) for _, at, length in cut)
                mine[here] = numbers[there].to(mine)


def boxes(source: Source, name: str, kind: str = "") -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The pieces in which a weight lies, or what the optimizer keeps for it: where each begins, and its numbers."""
    if isinstance(source, RunSource):
        yield from source.boxes(name, kind)
    else:
        whole = source.read_moment(kind, name) if kind else source.read(name)
        yield (0,) * whole.dim(), whole


def runs(index: Tensor) -> Iterator[Span]:
    """Ascending indices as spans of neighbours."""
    cuts = ((index.diff() != 1).nonzero().flatten() + 1).tolist()
    for here, end in pairwise([0, *cuts, index.numel()]):
        if end > here:
            yield here, int(index[here]), end - here


def overlap(span: Span, begin: int, size: int) -> Span:
    """What a span and the box [begin, begin + size) share: place here, place in the box, length."""
    here, there, length = span
    first, last = max(there, begin), min(there + length, begin + size)
    return here + first - there, first - begin, max(0, last - first)
