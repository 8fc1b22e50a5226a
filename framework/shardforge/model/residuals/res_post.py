"""Norm on what each branch returns, before it joins the stream.

Paper: OLMo Team 2024, "2 OLMo 2 Furious", arXiv:2501.00656, eq. 1-2; Liu et al. 2021, "Swin Transformer V2",
    arXiv:2111.09883, section 3.2.
Changes: x + N(F(x)); a norm stands before the head.
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


@residuals.register("res_post")
@dataclass(frozen=True, kw_only=True)
class ResPostConfig:
    norm: Norm = option("rmsnorm", "the norm")
    dropout: float = option(0.0, "share of a branch's output set to zero in training", at_least=0, at_most=0.99)

    def build(self, ctx: BuildContext, branch: str) -> ResPost:
        return ResPost(self, ctx, branch)


class ResPost(Module):
    slot = "residual"

    def __init__(self, cfg: ResPostConfig, ctx: BuildContext, branch: str):
        super().__init__()
        self.norm = cfg.norm.build(ctx.hidden)
        self.dropout = Dropout(cfg.dropout, ctx.layer, branch)

    def forward(self, x: Tensor, branch: Branch, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        return x + self.dropout(self.norm(branch(x)), seq)
