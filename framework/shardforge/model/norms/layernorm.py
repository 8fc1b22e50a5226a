"""Layer normalization with learned gain and bias.

Paper: Ba, Kiros, Hinton 2016, "Layer Normalization", arXiv:1607.06450, eq. 4.
Changes: y = weight * (x - mean) / sqrt(var + eps) + bias, statistics in float32.
Cost: two reductions over the normalized dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import option
from shardforge.core.slots import norms
from shardforge.nn.init import ones, zeros
from shardforge.nn.module import Module, local


@norms.register("layernorm")
@dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    eps: float = option(1e-5, "added to the variance", above=0)
    bias: bool = option(True, "whether a learned bias is added")

    def build(self, dim: Dim) -> LayerNorm:
        return LayerNorm(self, dim)


class LayerNorm(Module):
    """`total` sums moments over the ranks that share the normalized dimension; None when one rank has it all.
    `rows` are those of the weight that this rank works with, None for all it has."""

    def __init__(self, cfg: LayerNormConfig, dim: Dim):
        super().__init__()
        self.eps, self.size = cfg.eps, dim.size
        self.declare("weight", dim, init=ones)
        self.biased = cfg.bias
        if cfg.bias:
            self.declare("bias", dim, init=zeros)
        self.total: Callable[[Tensor], Tensor] | None = None
        self.rows: slice | None = None

    def forward(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        weight = local(self.weight, self.rows)
        bias = local(self.bias, self.rows) if self.biased else None
        if self.total is None:
            return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - self.total(wide.sum(-1, keepdim=True)) / self.size
        variance = self.total(centred.square().sum(-1, keepdim=True)) / self.size
        y = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype) * weight
        return y if bias is None else y + bias
