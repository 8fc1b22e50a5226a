"""One matrix of one expert from the dense one: a copy of the chosen neurons, and noise where the method says so.

Everything goes in bands of rows that fit a core's cache. A dense matrix lies as the experts have it, [hidden, f] for
gate and up and [f, hidden] for down, so neurons are its columns (`axis` 1) or its rows (`axis` 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardforge.upcycle.method import Edit, Indices, Moments
from shardforge.upcycle.normals import Normals

BAND_NUMBERS = 1 << 18
Seen = Callable[[slice, Tensor], None]
"""Told about each finished band: which rows, and their numbers in float32."""


@dataclass(frozen=True)
class Dense:
    """A matrix of the dense ffn, transposed, in the source's type."""

    numbers: Tensor  # [hidden, f] or [f, hidden]
    axis: int  # of the neurons
    moments: Moments

    @classmethod
    def of(cls, weight: Tensor, axis: int) -> Dense:
        """From a Linear's weight [out, in], or a bias [f] of neurons."""
        numbers = weight[None] if weight.dim() == 1 else weight.t().contiguous()
        return cls(numbers, axis, _moments(numbers, axis))


def write(
    out: Tensor,
    dense: Dense,
    neurons: Indices | None,
    edit: Edit,
    noise: Normals,
    factor: float = 1.0,
    seen: Seen | None = None,
) -> None:
    """Fill `out` [hidden, f_expert] or [f_expert, hidden] with one expert's matrix.

    Noise is drawn in float32, row by row of the redrawn part of `out`: [hidden, places] or [places, hidden].
    """
    places = torch.from_numpy(edit.places)
    rows = out.shape[0]
    order = None if neurons is None else torch.from_numpy(neurons)
    whole = len(edit.places) == out.shape[dense.axis] and not edit.added
    room = np.empty(0 if edit.std == 0.0 else min(out.numel(), max(BAND_NUMBERS, out.shape[1])), np.float32)
    for band in bands(rows, out.shape[1]):
        part = out[band]
        if not whole:
            _copy(part, dense, order, band, factor)
        if edit.places.size:
            inside = _inside(edit.places, band) if dense.axis == 0 else None
            _change(part, places if inside is None else inside, edit, noise, factor, dense.axis, room)
        if seen is not None:
            seen(band, part.float())


def bands(rows: int, width: int) -> Iterator[slice]:
    """Consecutive rows of at most BAND_NUMBERS numbers together."""
    step = max(1, BAND_NUMBERS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _copy(part: Tensor, dense: Dense, order: Tensor | None, band: slice, factor: float) -> None:
    if order is None:
        found = dense.numbers[band]
    elif dense.axis == 0:
        found = dense.numbers.index_select(0, order[band])
    else:
        found = dense.numbers[band].index_select(1, order)
    part.copy_(found if factor == 1.0 else found.float().mul_(factor))


def _change(
    part: Tensor,
    places: Tensor,
    edit: Edit,
    noise: Normals,
    factor: float,
    axis: int,
    room: NDArray[np.float32],
) -> None:
    """`room` is memory for as many numbers as `part` has."""
    if edit.std == 0.0:
        if not edit.added:
            part.index_fill_(axis, places, edit.mean * factor)
        return
    shape = list(part.shape)
    shape[axis] = len(places)
    drawn = torch.from_numpy(noise.fill(room[: prod(shape)].reshape(shape)))
    drawn.mul_(edit.std).add_(edit.mean)
    if factor != 1.0:
        drawn.mul_(factor)
    if edit.added:
        drawn += part.index_select(axis, places).float()
    part.index_copy_(axis, places, drawn.to(part.dtype))


def _inside(places: Indices, band: slice) -> Tensor:
    """The places that lie in a band of rows, counted from its first."""
    first, last = np.searchsorted(places, [band.start, band.stop])
    return torch.from_numpy(places[first:last] - band.start)


def _moments(numbers: Tensor, axis: int) -> Moments:
    other = 1 - axis
    sums, squares = (torch.zeros(numbers.shape[axis], dtype=torch.float64) for _ in range(2))
    for band in bands(*numbers.shape):
        wide = numbers[band].double()
        mine = band if axis == 0 else slice(None)
        sums[mine] += wide.sum(other)
        squares[mine] += wide.square_().sum(other)
    return Moments(numbers.shape[other], sums.numpy(), squares.numpy())
