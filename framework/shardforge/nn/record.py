"""Auxiliary losses from inside a model: a tensor whose backward pass also differentiates a loss on the side."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function


class _Charge(Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.dtype = loss.dtype
        return x.clone()  # a view would keep a split backward pass from detaching it

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.new_ones((), dtype=ctx.dtype)


def charge(x: Tensor, loss: Tensor) -> Tensor:
    """x, unchanged; its backward pass adds the gradient of `loss`, 0-d.

    `loss` is this rank's and micro-batch's part of the loss of the whole batch: coefficient and normalisation by
    `Sequence.shares` are inside, and the sum over all ranks and micro-batches is what one process would charge. So it
    needs no path to the objective, and works on every stage of a pipeline.
    """
    return _Charge.apply(x, loss) if x.requires_grad else x
