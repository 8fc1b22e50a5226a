"""Root-mean-square normalization with a learned gain.

Paper: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467, eq. 4.
Changes: y = (offset + weight) * x / sqrt(mean(x^2) + eps), statistics in float32; Gemma stores weight with offset 1.
Cost: one reduction over the normalized dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import option
from shardforge.core.slots import norms
from shardforge.nn.fused import rms_norm
from shardforge.nn.init import constant
from shardforge.nn.module import Module, local


@norms.register("rmsnorm")
@dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    eps: float = option(1e-6, "added to the mean square", above=0)
    offset: float = option(0.0, "added to the stored gain; the gain starts at 1 either way")

    def build(self, dim: Dim) -> RMSNorm:
        return RMSNorm(self, dim)


class RMSNorm(Module):
    """`total` sums the squares over the ranks that share the normalized dimension; None when one rank has it all.
    `rows` are those of the weight that this rank works with, None for all it has."""

    def __init__(self, cfg: RMSNormConfig, dim: Dim):
        super().__init__()
        self.eps, self.offset, self.size = cfg.eps, cfg.offset, dim.size
        self.declare("weight", dim, init=constant(1.0 - cfg.offset))
        self.total: Callable[[Tensor], Tensor] | None = None
        self.rows: slice | None = None

    def forward(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        weight = local(self.weight, self.rows)
        if self.offset:
            weight = weight + self.offset
        if self.total is None:
            return rms_norm(x, weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.total(wide.square().sum(-1, keepdim=True)) / self.size
        return (wide * torch.rsqrt(mean + self.eps)).to(x.dtype) * weight
