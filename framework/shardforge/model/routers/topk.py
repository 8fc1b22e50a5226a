"""The k experts with the largest logits, weighted by softmax.

Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 3-5, without noise; `all` is
    Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, eq. 1-2; `chosen` is Mixtral, arXiv:2401.04088, eq. 2.1.
Changes: p = softmax(x W^T); weights are p of the k largest, divided by their sum when `over` is "chosen".
Cost: hidden * experts weights.
Limits: ties go to one of the tied experts, not always to the first. With k = 1 "chosen" makes every weight 1, and the
    router learns from the balance and z losses alone.
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


@routers.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    over: Literal["chosen", "all"] = option("chosen", "experts over which the weights of a token add up to 1")
    scale: float = option(1.0, "factor on the weights", above=0)

    def build(self, ctx: BuildContext, experts: int, k: int) -> TopK:
        return TopK(self, ctx, experts, k)


class TopK(Logits):
    def __init__(self, cfg: TopKConfig, ctx: BuildContext, experts: int, k: int):
        super().__init__(experts, ctx)
        self.k, self.over, self.scale = k, cfg.over, cfg.scale

    def forward(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:  # [b, s, h]
        logits = self.logits(x)
        shares = logits.softmax(-1)
        weight, expert = shares.topk(self.k, -1)
        if self.over == "chosen":
            weight = weight / weight.sum(-1, keepdim=True)
        return Routing(expert, weight * self.scale, shares, logits)
