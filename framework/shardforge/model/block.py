"""One layer: a mixer and an ffn, each joined to the residual stream."""

from __future__ import annotations

from torch import Tensor

from shardforge.model.context import BuildContext
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence
from shardforge.recipe.model import BlockConfig


class Block(Module):
    slot = "block"

    def __init__(self, cfg: BlockConfig, ctx: BuildContext):
        super().__init__()
        self.layer = ctx.layer
        self.mixer = cfg.mixer.build(ctx)
        self.mixer_residual = cfg.residual.build(ctx, "mixer")
        self.ffn = cfg.ffn.build(ctx)
        self.ffn_residual = cfg.residual.build(ctx, "ffn")

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        x = self.mixer_residual(x, lambda y: self.mixer(y, seq), seq)
        return self.ffn_residual(x, lambda y: self.ffn(y, seq), seq)
