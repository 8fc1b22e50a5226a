"""A norm before and another after each branch.

Paper: Ding et al. 2021, "CogView", arXiv:2105.13290, section 2.4; Gemma Team 2024, "Gemma 2", arXiv:2408.00118.
Changes: x + N2(F(N1(x))); a norm stands before the head.
Cost: two norms a branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.options import option
from shardforge.core.slots import Norm, residuals
from shardforge.model.context import BuildContext
from shardforge.nn.dropout import Dropout
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence
from shardforge.nn.stream import Branch


@residuals.register("sandwich")
@dataclass(frozen=True, kw_only=True)
class SandwichConfig:
    norm: Norm = option("rmsnorm", "the norm")
    dropout: float = option(0.0, "share of a branch's output set to zero in training", at_least=0, at_most=0.99)

    def build(self, ctx: BuildContext, branch: str) -> Sandwich:
        return Sandwich(self, ctx, branch)


class Sandwich(Module):
    slot = "residual"

    def __init__(self, cfg: SandwichConfig, ctx: BuildContext, branch: str):
        super().__init__()
        self.norm = cfg.norm.build(ctx.hidden)
        self.norm_out = cfg.norm.build(ctx.hidden)
        self.dropout = Dropout(cfg.dropout, ctx.layer, branch)

    def forward(self, x: Tensor, branch: Branch, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        return x + self.dropout(self.norm_out(branch(self.norm(x))), seq)
