"""Matrix products of many small weights at once: one group of rows for each.

On the CPU a loop of products into place: on two threads, 12288 rows in 64 groups, width 1024 to 512, forward, gradient
of x and of the weights took 43, 47 and 49 ms in float32 against 49, 69 and 72 ms of torch's grouped kernel, and 10, 14
and 19 against 11, 15 and 44 ms in bfloat16 (torch 2.13, 22 November 2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import Function

WIDTH_BYTES = 16
"""Rows of operands must be whole multiples of this for the grouped kernel."""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, d] whose rows lie group by group, weight [e, d, f], bias [e, f], counts [e] rows of each group -> [n, f].

    A group without rows gets gradients of zeros. The gradient that arrives may have any strides.
    """
    if _has_kernel(x, weight):
        y = F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
        if y.requires_grad:
            y.register_hook(Tensor.contiguous)  # the kernel refuses expanded gradients
    else:
        y = grouped_mm(x, weight, counts)
    return y if bias is None else grouped_add(y, bias, counts)


def grouped_linears(
    x: Tensor, weights: Sequence[Tensor], counts: Tensor, biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """grouped_linear of the same x by each of `weights`, with the bias in the same place of `biases`."""
    if len(weights) == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return [grouped_linear(x, weight, counts, bias) for weight, bias in zip(weights, biases, strict=True)]
    found = _Several.apply(x, counts, *weights)
    return [y if bias is None else grouped_add(y, bias, counts) for y, bias in zip(found, biases, strict=True)]


class _Several(Function):
    """Products whose parts of the gradient of x are added where they are made, not in passes over [n, d] of their own:
    46 against 59 ms of a GLU in bfloat16, 12288 rows of 1024 by two weights to 256, on one thread (22 Nov. 2026)."""

    @staticmethod
    def forward(ctx, x, counts, *weights):
        ctx.save_for_backward(x, counts, *weights)
        return tuple(grouped_mm(x, weight, counts) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        x, counts, *weights = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grouped_mm(grads[0], weights[0].transpose(1, 2), counts)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grouped_mm_onto(grad, weight.transpose(1, 2), counts, dx)
        needed = zip(grads, ctx.needs_input_grad[2:], strict=True)
        return dx, None, *(grouped_outer(x, grad, counts) if wanted else None for grad, wanted in needed)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """No kernel for other types than bfloat16, nor for rows that do not fill whole vectors."""
    if x.device.type == "cpu" or x.dtype != torch.bfloat16 or x.shape[0] == 0:
        return False
    return not any(width * x.element_size() % WIDTH_BYTES for width in weight.shape[1:])


@torch.library.custom_op("shardforge::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """grouped_linear by a loop, which is one operation for a compiler and for what chooses activations to keep."""
    y = x.new_empty(x.shape[0], weight.shape[2])
    pieces = listed(counts, x.shape[0])
    for rows, each, out in zip(x.split(pieces), weight.unbind(0), y.split(pieces), strict=True):
        torch.mm(rows, each, out=out)
    return y


@torch.library.custom_op("shardforge::grouped_mm_onto", mutates_args=("y",))
def grouped_mm_onto(x: Tensor, weight: Tensor, counts: Tensor, y: Tensor) -> None:
    """Adds grouped_mm(x, weight, counts) to y [n, f], without a gradient."""
    pieces = listed(counts, x.shape[0])
    for rows, each, out in zip(x.split(pieces), weight.unbind(0), y.split(pieces), strict=True):
        out.addmm_(rows, each)


@torch.library.custom_op("shardforge::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """x [n, d], y [n, f] -> [e, d, f]: of each group the sum over its rows of x^T y."""
    out = x.new_empty(counts.shape[0], x.shape[1], y.shape[1])
    pieces = listed(counts, x.shape[0])
    for left, right, each in zip(x.split(pieces), y.split(pieces), out.unbind(0), strict=True):
        torch.mm(left.t(), right, out=each)
    return out


@torch.library.custom_op("shardforge::grouped_add", mutates_args=())
def grouped_add(y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """y [n, f], bias [e, f] -> [n, f]: to each row the bias of its group."""
    return y + bias.repeat_interleave(counts, 0, output_size=y.shape[0])


@torch.library.custom_op("shardforge::grouped_sum", mutates_args=())
def grouped_sum(y: Tensor, counts: Tensor) -> Tensor:
    """y [n, f] -> [e, f]: the sum of the rows of each group, always in one order."""
    if y.device.type == "cpu":
        return torch.stack([rows.sum(0) for rows in y.split(listed(counts, y.shape[0]))])
    return segment_sum(y, counts)


def segment_sum(y: Tensor, counts: Tensor) -> Tensor:
    """grouped_sum without a wait for the device: one kernel, which adds the rows of a group one after the other."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))  # the kernel adds in the type that it is given
    return torch.segment_reduce(wide, "sum", lengths=counts, axis=0, unsafe=True).to(y.dtype)


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_mm_onto.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor, y: Tensor) -> None:
    return None


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], y.shape[1])


@grouped_add.register_fake
def _(y: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@grouped_sum.register_fake
def _(y: Tensor, counts: Tensor) -> Tensor:
    return y.new_empty(counts.shape[0], y.shape[1])


def _product_saves(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _product_backward(ctx, grad):
    x, weight, counts = ctx.saved_tensors
    dx = grouped_mm(grad, weight.transpose(1, 2), counts) if ctx.needs_input_grad[0] else None
    dweight = grouped_outer(x, grad, counts) if ctx.needs_input_grad[1] else None
    return dx, dweight, None


def _add_saves(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[2])


def _add_backward(ctx, grad):
    (counts,) = ctx.saved_tensors
    return grad, grouped_sum(grad, counts) if ctx.needs_input_grad[1] else None, None


grouped_mm.register_autograd(_product_backward, setup_context=_product_saves)
grouped_add.register_autograd(_add_backward, setup_context=_add_saves)

PRODUCT = torch.ops.shardforge.grouped_mm.default
"""The operation behind grouped_mm, by which modes that watch operations know it."""


def listed(counts: Tensor, rows: int) -> list:
    """Counts [pieces] or [m, pieces] as numbers: the wait for the device that uneven pieces cost.

    A dry run has no numbers; there `rows` fall evenly on the pieces.
    """
    if not (isinstance(counts, FakeTensor) or counts.is_meta):
        return counts.tolist()
    pieces = counts.shape[-1]
    even = [rows // pieces + (piece < rows % pieces) for piece in range(pieces)]
    return even if counts.dim() == 1 else [even] * len(counts)
