"""Elementwise pieces with a backward pass written out: fewer passes over memory than autograd's own, same numbers.

On CUDA torch fuses these itself; here they serve the CPU and are the definition that kernels are compared with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d], weight [d]: weight * x / sqrt(mean(x^2) + eps), statistics in float32 at least."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # y = w n, n = x s: dw = sum(g n), dx = s (g w - n mean(g w n))
        x, weight, scale = ctx.saved_tensors
        n = x * scale
        dn = grad * n
        dweight = dn.flatten(0, -2).sum(0)
        mean = (dn @ weight).div_(x.shape[-1])[..., None]
        return torch.mul(grad, weight).sub_(n.mul_(mean)).mul_(scale), dweight, None


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
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (left, right) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=left)
    left.addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=right)
    right.addcmul_(a, sin, value=sign)
    return out
