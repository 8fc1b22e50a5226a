"""Elementwise pieces with a backward pass written out: fewer passes over memory than autograd's own, same numbers.

On CUDA torch fuses these itself; here they serve the CPU and are the definition that kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

CACHED = 1 << 17
"""Elements worked on at a time."""


class Curve(Protocol):
    """An elementwise function, and `out` = its derivative at x times `grad`."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def slope(self, grad: Tensor, x: Tensor, out: Tensor) -> None: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d]: weight * x / sqrt(mean(x^2) + eps), statistics in float32 at least."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rows, y = x.reshape(-1, x.shape[-1]), torch.empty_like(x, memory_format=torch.contiguous_format)
        scale = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        for part, out, each in _parts(rows, y.view_as(rows), scale):
            torch.mul(part, each, out=out).mul_(weight)
        ctx.save_for_backward(rows, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        # y = w n with n = x s: dw = sum(g n), dx = s (g w - n mean(g w n))
        rows, weight, scale = ctx.saved_tensors
        dx, dweight = torch.empty_like(grad, memory_format=torch.contiguous_format), torch.zeros_like(weight)
        for part, each, g, out in _parts(rows, scale, grad.reshape(rows.shape), dx.view(rows.shape)):
            n = part * each
            dn = g * n
            dweight += dn.sum(0)
            n *= (dn @ weight).div_(rows.shape[-1])[:, None]
            torch.mul(g, weight, out=out).sub_(n).mul_(each)
        return dx, dweight, None


def gated(gate: Tensor, up: Tensor, curve: Curve) -> Tensor:
    """curve(gate) * up, both [..., f]."""
    if gate.device.type != "cpu" or torch.compiler.is_compiling():
        return curve(gate) * up
    return _Gated.apply(gate, up, curve)


class _Gated(Function):
    @staticmethod
    def forward(ctx, gate, up, curve):
        curved = curve(gate)
        ctx.save_for_backward(gate, up, curved)
        ctx.curve = curve
        return curved * up

    @staticmethod
    def backward(ctx, grad):
        gate, up, curved = ctx.saved_tensors
        dgate, dup = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))
        flat = (t.reshape(-1, gate.shape[-1]) for t in (gate, up, curved, grad, dgate, dup))
        for g, u, c, dy, dg, du in _parts(*flat):
            torch.mul(dy, c, out=du)
            ctx.curve.slope(dy * u, g, dg)
        return dgate, dup, None


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor [t, d], few enough that what is made of them stays in the cache of a core."""
    size = max(1, CACHED // max(tensor.shape[-1] for tensor in tensors))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, s, n, d], cos and sin [b, s, 1, d/2]: each pair (i, i + d/2) turned by its angle, in the tables' type."""
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    out = x * torch.cat([cos, cos], -1)
    (a, b), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    left.addcmul_(b, sin, value=-sign)
    right.addcmul_(a, sin, value=sign)
    return out
