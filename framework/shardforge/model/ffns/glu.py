"""Gated linear unit: one projection gates the other.

Paper: Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, eq. 5-6 (silu: SwiGLU; gelu: GEGLU).
Changes: y = (curve(x W_gate) * x W_up) W_down.
Cost: three matrices of hidden * inner.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import ffns
from shardforge.model.activations import CURVES, Activation
from shardforge.model.context import BuildContext
from shardforge.nn.fused import gated
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


@ffns.register("glu")
@dataclass(frozen=True, kw_only=True)
class GLUConfig:
    inner: int = option(REQUIRED, "width between the projections", at_least=1)
    activation: Activation = option("silu", "curve on the gate")
    bias: bool = option(False, "whether the projections have biases")

    def build(self, ctx: BuildContext) -> GLU:
        return GLU(self, ctx)


class GLU(Module):
    slot = "ffn"
    enters, leaves = ("gate", "up"), "down"

    def __init__(self, cfg: GLUConfig, ctx: BuildContext):
        super().__init__()
        h, f = ctx.hidden, Dim("ffn", cfg.inner)
        self.curve = CURVES[cfg.activation]
        self.gate = Linear(h, f, ctx.into(h), cfg.bias)
        self.up = Linear(h, f, ctx.into(h), cfg.bias)
        self.down = Linear(f, h, ctx.out_of(f), cfg.bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        return self.down(gated(self.gate(x), self.up(x), self.curve))
