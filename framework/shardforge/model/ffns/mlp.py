"""Two projections with a curve between them.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, eq. 2.
Changes: y = curve(x W_up) W_down.
Cost: two matrices of hidden * inner.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import ffns
from shardforge.model.activations import CURVES, Activation
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


@ffns.register("mlp")
@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    inner: int = option(REQUIRED, "width between the projections", at_least=1)
    activation: Activation = option("gelu", "curve between the projections")
    bias: bool = option(False, "whether the projections have biases")

    def build(self, ctx: BuildContext) -> MLP:
        return MLP(self, ctx)


class MLP(Module):
    slot = "ffn"
    enters, leaves = ("up",), "down"

    def __init__(self, cfg: MLPConfig, ctx: BuildContext):
        super().__init__()
        h, f = ctx.hidden, Dim("ffn", cfg.inner)
        self.curve = CURVES[cfg.activation]
        self.up = Linear(h, f, ctx.into(h), cfg.bias)
        self.down = Linear(f, h, ctx.out_of(f), cfg.bias)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        return self.down(self.curve(self.up(x)))
