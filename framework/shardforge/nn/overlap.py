"""Matmuls that run beside the collective before or after them: the sequence travels in pieces.

    gather, then matmul          piece 0 ~~> | piece 1 ~~> | piece 2 ~~> |
                                             | matmul 0    | matmul 1    | matmul 2

All pieces set out at once and are waited for in their order; a piece is the same share of every rank's positions. In
the backward pass the pieces of the input gradient leave as they are made, and the gradient of the weight, which no
other rank waits for, is computed while they travel. Results are settled tensors, as everywhere (nn.collectives).

Here a collective and a matmul do share one autograd function: the order between them is the point. A schedule that
splits the backward pass in two would run both halves of such a function twice, so the two exclude each other.

Cost: one more copy of what arrives, and PIECES smaller matmuls for one. On CPU it gains nothing, since gloo takes the
cores of the matmuls: 0.95 to 1.28 of the step time without it (2026-11-22, tp2 on two busy cores, four layers, hidden
256 to 1024). No GPU has measured it yet.

Source: Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition", ASPLOS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from shardforge.nn.collectives import start_gather, start_scatter_sum

PIECES = 4
"""Pieces of the sequence: with n of them at most 1/n of the communication has no matmul beside it."""

Flight = tuple[slice, Tensor, dist.Work]


class Arriving:
    """The input of a slot: x [b, s/p, h] of this rank, of which the Linears inside read all [b, s, h].

    The first product is computed piece by piece as the pieces arrive; the others find the whole sequence there.
    """

    def __init__(self, group: ProcessGroup, x: Tensor):
        self.group, self.x = group, x
        self.whole: Tensor | None = None

    def product(self, weight: Tensor, bias: Tensor | None) -> Tensor:  # [o, h] -> [b, s, o]
        if self.whole is not None:
            return F.linear(self.whole, weight, bias)
        y, self.whole = _GatherProduct.apply(self.x, weight, bias, self.group)
        return y


def arriving_product(x: Arriving, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias of a sequence on its way."""
    return x.product(weight, bias)


def product_scatter_sum(group: ProcessGroup, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [b, s, i], weight [h, i]: x W^T + bias summed over the ranks, each keeping its positions [b, s/p, h]."""
    return _ProductScatterSum.apply(x, weight, bias, group)


class _GatherProduct(Function):
    """x [b, s/p, h] -> (x W^T + bias [b, s, o], the whole x [b, s, h])."""

    @staticmethod
    def forward(ctx, x, weight, bias, group):
        b, part, h = x.shape
        flights = _each(part, lambda cut: start_gather(x[:, cut], group))
        y, whole = x.new_empty(b, group.size() * part, len(weight)), x.new_empty(b, group.size() * part, h)
        for cut, piece in _landed(flights):  # [p, b, piece, h]
            _of_all_ranks(whole, group, cut).copy_(piece)
            _of_all_ranks(y, group, cut).copy_(F.linear(piece, weight, bias))
        ctx.group = group
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, weight)
        return y, whole

    @staticmethod
    def backward(ctx, dy, dwhole):
        whole, weight = ctx.saved_tensors
        dx = whole.new_empty(whole.shape[0], whole.shape[1] // ctx.group.size(), whole.shape[2])

        def sent(cut: slice) -> tuple[Tensor, dist.Work]:
            piece = _of_all_ranks(dy, ctx.group, cut) @ weight
            if dwhole is not None:  # of the other products
                piece += _of_all_ranks(dwhole, ctx.group, cut)
            return start_scatter_sum(piece, ctx.group)

        flights = _each(dx.shape[1], sent)
        dweight, dbias = _weight_grads(ctx, dy, whole)
        for cut, piece in _landed(flights):
            dx[:, cut] = piece
        return dx, dweight, dbias, None


class _ProductScatterSum(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, group):
        y = x.new_empty(x.shape[0], x.shape[1] // group.size(), len(weight))

        def sent(cut: slice) -> tuple[Tensor, dist.Work]:
            return start_scatter_sum(F.linear(_of_all_ranks(x, group, cut), weight, bias), group)

        for cut, piece in _landed(_each(y.shape[1], sent)):
            y[:, cut] = piece
        ctx.group = group
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        flights = _each(dy.shape[1], lambda cut: start_gather(dy[:, cut], ctx.group))
        dx, whole = torch.empty_like(x, memory_format=torch.contiguous_format), dy.new_empty(*x.shape[:2], dy.shape[2])
        for cut, piece in _landed(flights):
            _of_all_ranks(whole, ctx.group, cut).copy_(piece)
            _of_all_ranks(dx, ctx.group, cut).copy_(piece @ weight)
        return dx, *_weight_grads(ctx, whole, x), None


def _each(part: int, start: Callable[[slice], tuple[Tensor, dist.Work]]) -> list[Flight]:
    """Start one collective for each piece of `part` positions."""
    ends = [part * n // PIECES for n in range(PIECES + 1)]
    cuts = [slice(low, high) for low, high in pairwise(ends) if high > low]
    return [(cut, *start(cut)) for cut in cuts]


def _landed(flights: list[Flight]) -> Iterator[tuple[slice, Tensor]]:
    for cut, piece, work in flights:
        work.wait()
        yield cut, piece


def _of_all_ranks(x: Tensor, group: ProcessGroup, cut: slice) -> Tensor:
    """x [b, s, h] -> the positions `cut` of every rank's part, [p, b, piece, h], a view."""
    return x.unflatten(1, (group.size(), -1))[:, :, cut].transpose(0, 1)


def _weight_grads(ctx, dy: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows = dy.flatten(0, 1)
    return (
        rows.T @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )
