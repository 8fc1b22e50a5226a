"""Elementwise pieces with a backward pass written out: fewer passes over memory than autograd's own, same numbers.

On CUDA torch fuses these itself; here they serve the CPU and are the definition that kernels are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

CACHED = 1 << 17
"""Elements worked on at a time."""

SHARPNESS = 1.702
"""With it x * sigmoid(SHARPNESS * x) is near gelu(x); Hendrycks and Gimpel 2016, arXiv:1606.08415."""
Pairing = Literal["half", "interleaved"]
"""Which channels of a head turn together, see `rotate`."""


class Curve(Protocol):
    """An elementwise function; slope(grad, x, out) writes `grad` times its derivative at x to `out`."""

    def __call__(self, x: Tensor) -> Tensor: ...

    @property
    def slope(self) -> Callable[[Tensor, Tensor, Tensor], object]: ...


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
        for part, out, each in parts(rows, y.view_as(rows), scale):
            torch.mul(part, each, out=out).mul_(weight)
        ctx.save_for_backward(rows, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad):
        # y = w n with n = x s: dw = sum(g n), dx = s (g w - n mean(g w n))
        rows, weight, scale = ctx.saved_tensors
        dx, dweight = torch.empty_like(grad, memory_format=torch.contiguous_format), torch.zeros_like(weight)
        for part, each, g, out in parts(rows, scale, grad.reshape(rows.shape), dx.view(rows.shape)):
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
        for g, u, c, dy, dg, du in parts(*flat):
            torch.mul(dy, c, out=du)
            ctx.curve.slope(dy * u, g, dg)
        return dgate, dup, None


def parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor [t, ...], few enough that what is made of them stays in the cache of a core."""
    size = max(1, CACHED // max(tensor[:1].numel() for tensor in tensors)) if len(tensors[0]) else 1
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(1.702 gate), gate at most `limit` and up within +-limit: gpt-oss's gated unit."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(SHARPNESS * gate))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Pairing = "half") -> Tensor:
    """x [b, s, n, d], cos and sin [b, s, 1, d/2]: each pair of channels turned by its angle, in the tables' type.

    Pairs are (i, i + d/2) in the layout "half" and (2i, 2i + 1) in the layout "interleaved".
    """
    if x.dtype == cos.dtype and not torch.compiler.is_compiling():
        return _Rotate.apply(x, cos, sin, layout)
    a, b = _pairs(x, layout)
    return _joined(a * cos - b * sin, b * cos + a * sin, layout).to(x.dtype)


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin, layout):
        ctx.save_for_backward(cos, sin)
        ctx.layout = layout
        return _turned(x, cos, sin, layout, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.layout, -1), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, layout: Pairing, sign: int) -> Tensor:
    out = x * _joined(cos, cos, layout)
    (a, b), (left, right) = _pairs(x, layout), _pairs(out, layout)
    left.addcmul_(b, sin, value=-sign)
    right.addcmul_(a, sin, value=sign)
    return out


def _pairs(x: Tensor, layout: Pairing) -> tuple[Tensor, Tensor]:
    """Views [..., d/2] of the first and of the second channel of each pair."""
    a, b = x.chunk(2, -1) if layout == "half" else x.unflatten(-1, (-1, 2)).unbind(-1)
    return a, b


def _joined(a: Tensor, b: Tensor, layout: Pairing) -> Tensor:
    return torch.cat([a, b], -1) if layout == "half" else torch.stack([a, b], -1).flatten(-2)
