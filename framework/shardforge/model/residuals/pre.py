"""Norm before each branch.

Paper: Xiong et al. 2020, "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745, table 1 right.
Changes: x + F(N(x)); a norm stands before the head.
Cost: one norm a branch.
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


@residuals.register("pre")
@dataclass(frozen=True, kw_only=True)
class PreConfig:
    norm: Norm = option("rmsnorm", "the norm")
    dropout: float = option(0.0, "share of a branch's output set to zero in training", at_least=0, at_most=0.99)

    def build(self, ctx: BuildContext, branch: str) -> Pre:
        return Pre(self, ctx, branch)


class Pre(Module):
    slot = "residual"

    def __init__(self, cfg: PreConfig, ctx: BuildContext, branch: str):
        super().__init__()
        self.norm = cfg.norm.build(ctx.hidden)
        self.dropout = Dropout(cfg.dropout, ctx.layer, branch)

    def forward(self, x: Tensor, branch: Branch, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        return x + self.dropout(branch(self.norm(x)), seq)
