"""The expert with the largest affinity, weighted by it: one expert a token.

Paper: Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, eq. 1-2, sections 2.4 (float32, a small start) and
    appendix C (jitter).
Changes: the topk router with raw weights, k = 1 and jitter; W starts as a normal distribution cut at two deviations,
    whose deviation is sqrt(init_scale / hidden) before the cut.
Cost: hidden * experts weights.
Limits: the rest of the paper belongs to the mixture: its balance loss is {scope: sequence} with weight 1.0e-2, its
    capacity {factor: 1.25, eval_factor: 2.0}.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import routers
from shardforge.model.context import BuildContext
from shardforge.model.routers.topk import TopK, TopKConfig
from shardforge.nn.init import truncated_normal


@routers.register("switch")
@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    jitter: float = option(
        1e-2, "in training x is multiplied by uniform numbers from 1 - jitter to 1 + jitter", at_least=0, at_most=0.99
    )
    init_scale: float = option(0.1, "variance of W at the start, times hidden", above=0)

    def check(self, experts: int, k: int) -> None:
        if k != 1:
            what = f"kind: switch sends a token to one expert, not to k={k}"
            raise RecipeError(what, "router", "k: 1, or kind: topk")

    def build(self, ctx: BuildContext, experts: int, k: int) -> TopK:
        self.check(experts, k)
        init = truncated_normal(math.sqrt(self.init_scale / ctx.hidden.size))
        return TopK(TopKConfig(weights="raw", jitter=self.jitter), ctx, experts, k, init)
