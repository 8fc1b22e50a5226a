"""The k experts with the largest affinities, each affinity a sigmoid of its own.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, eq. 13-15, without the bias
    on the choice and without groups.
Changes: s = sigmoid(x W^T); weights are s of the k largest, divided by their sum when `over` is "chosen".
Cost: hidden * experts weights.
Limits: ties go to one of the tied experts, not always to the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shardforge.core.options import option
from shardforge.core.slots import routers
from shardforge.model.context import BuildContext
from shardforge.model.routing import Logits, Routing
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit

TINY = 1e-20
"""Added to the sum of the weights, as in DeepSeek-V3's released code."""


@routers.register("sigmoid")
@dataclass(frozen=True, kw_only=True)
class SigmoidConfig:
    over: Literal["chosen", "none"] = option(
        "chosen", "chosen: the weights of a token add up to 1; none: they are the affinities"
    )
    scale: float = option(1.0, "factor on the weights; DeepSeek-V3 takes 2.5", above=0)

    def build(self, ctx: BuildContext, experts: int, k: int) -> Sigmoid:
        return Sigmoid(self, ctx, experts, k)


class Sigmoid(Logits):
    def __init__(self, cfg: SigmoidConfig, ctx: BuildContext, experts: int, k: int):
        super().__init__(experts, ctx)
        self.k, self.over, self.scale = k, cfg.over, cfg.scale

    def forward(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:  # [b, s, h]
        logits = self.logits(x)
        affinity = logits.sigmoid()
        weight, expert = affinity.topk(self.k, -1)
        if self.over == "chosen":
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        return Routing(expert, weight * self.scale, affinity / affinity.sum(-1, keepdim=True), logits)
