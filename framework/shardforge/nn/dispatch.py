"""Tokens to experts and back: one interface for every way to get there, and the way on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from shardforge.nn.grouped import listed

Run = Callable[[Tensor, Tensor], Tensor]
"""What the experts of this rank do: (x [n, h], expert by expert; counts [e]) -> [n, h], in the same order."""

NOWHERE = -1
"""Expert of an assignment that is dropped."""


class Dispatch(Protocol):
    """A collective call: all ranks that share experts make it with their own tokens, perhaps none."""

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        """x [t, h], expert [t, k] (or NOWHERE), weight [t, k] -> [t, h]: sum over k of weight * expert(x)."""
        ...


@dataclass(frozen=True)
class Local:
    """All experts are here. `dropless` promises that no assignment is NOWHERE, which saves a wait for the device."""

    experts: int
    dropless: bool

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        order, counts = by_group(expert, self.experts)
        if not self.dropless:
            order = order[: listed(counts.sum()[None], order.numel())[0]]
        return weighted_sum(run(spread(x, order, expert.shape[1]), counts), order, weight)


def by_group(group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """group [t, k] of each assignment, or NOWHERE -> order [t * k], counts [groups].

    `order` are the indices of the assignments group by group, by token inside each; those to NOWHERE come last.
    """
    flat = group.flatten()
    return flat.remainder(groups + 1).argsort(stable=True), count(flat, groups)


def count(group: Tensor, groups: int) -> Tensor:
    """How often each of `groups` occurs along the last dimension: [..., n] -> [..., groups]; NOWHERE counts nowhere."""
    zeros = group.new_zeros(*group.shape[:-1], groups + 1)
    return zeros.scatter_add_(-1, group + 1, torch.ones_like(group))[..., 1:]


def spread(x: Tensor, order: Tensor, k: int) -> Tensor:
    """x [t, h], order [n] of t * k slots -> [n, h]: the row of each slot's token."""
    return _Spread.apply(x, order, k)


def gathered_sum(y: Tensor, order: Tensor, k: int, tokens: int) -> Tensor:
    """y [n, h] at the slots `order` of tokens * k -> [t, h]: the sum over the slots of each token."""
    return _Place.apply(y, order, tokens * k).view(tokens, k, *y.shape[1:]).sum(1)


def weighted_sum(y: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """y [n, h] at the slots `order`, weight [t, k] -> [t, h]: sums over k in one order, so they repeat exactly."""
    slots = _Place.apply(y, order, weight.numel()).view(*weight.shape, *y.shape[1:])
    return (slots * weight[..., None].to(y.dtype)).sum(1)


def _placed(y: Tensor, order: Tensor, slots: int) -> Tensor:
    return y.new_zeros(slots, *y.shape[1:]).index_copy_(0, order, y)


class _Spread(Function):
    """index_select, whose own backward adds with atomics on CUDA: another order at each run."""

    @staticmethod
    def forward(ctx, x, order, k):
        ctx.save_for_backward(order)
        ctx.shape = (x.shape[0], k)
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad):
        (order,), (tokens, k) = ctx.saved_tensors, ctx.shape
        return _placed(grad, order, tokens * k).view(tokens, k, *grad.shape[1:]).sum(1), None, None


class _Place(Function):
    @staticmethod
    def forward(ctx, y, order, slots):
        ctx.save_for_backward(order)
        return _placed(y, order, slots)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None
