"""Differentiable collectives. Each returns a settled, contiguous tensor: nothing asynchronous leaves this file.

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


def gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Pieces of all ranks joined along `dim`. Backward sums what the ranks send back and keeps the own piece."""
    return _Gather.apply(x, group, dim)


def scatter_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """Sum over the ranks, of which each keeps its piece along `dim`. Backward joins the pieces."""
    return _ScatterSum.apply(x, group, dim)


def all_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks, used differently by each of them: backward sums the gradients too."""
    return _AllSum.apply(x, group)
