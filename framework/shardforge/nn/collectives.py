"""Differentiable collectives. Each returns a settled, contiguous tensor; what only starts a collective is named so, and
is for autograd functions that wait for it themselves (nn.overlap).

Communication and matrix products stay in separate autograd functions, so that a schedule which splits the backward
pass runs each collective once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _gathered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(group.size() * front.shape[0], *front.shape[1:])
    _all_gather(out, front, group=group)
    return out.movedim(0, dim).contiguous()


def _scattered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(front.shape[0] // group.size(), *front.shape[1:])
    _reduce_scatter(out, front, group=group)
    return out.movedim(0, dim).contiguous()


def _summed(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class _Gather(Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return _gathered(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return _scattered(grad, ctx.group, ctx.dim), None, None


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return _scattered(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return _gathered(grad, ctx.group, ctx.dim), None, None


class _AllSum(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad, ctx.group), None


class _Exchange(Function):
    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(x, sent, received, group)

    @staticmethod
    def backward(ctx, grad):
        return _exchanged(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Pieces of all ranks joined along `dim`. Backward sums what the ranks send back and keeps the own piece."""
    return _Gather.apply(x, group, dim)


def scatter_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Sum over the ranks, of which each keeps its piece along `dim`. Backward joins the pieces."""
    return _ScatterSum.apply(x, group, dim)


def all_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks, used differently by each of them: backward sums the gradients too."""
    return _AllSum.apply(x, group)


def exchange(x: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """The first sent[0] rows of x go to the first rank of the group, the next sent[1] to the second, and so on.

    Returns the received[0] rows of the first rank, then those of the second, and so on; a count may be zero, and
    sent[j] on rank i must be received[i] on rank j. Backward sends the gradients back.
    """
    return _Exchange.apply(x, sent, received, group)


def start_gather(x: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    """x [...] of each rank -> [p, ...] on all, there once the work is done; no gradient."""
    x = x.contiguous()
    out = x.new_empty(group.size(), *x.shape)
    return out, _all_gather(out.flatten(0, 1), x, group=group, async_op=True)


def start_scatter_sum(x: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    """x [p, ...] -> the sum over ranks of the piece [...] of this rank, there once the work is done; no gradient."""
    x = x.contiguous()
    out = x.new_empty(x.shape[1:])
    return out, _reduce_scatter(out, x.flatten(0, 1), group=group, async_op=True)
