"""Adam with decoupled weight decay.

Paper: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
Changes: torch's fused AdamW over the local pieces; only the named roles of weights decay.
Cost: two numbers of state a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from shardforge.core.options import option
from shardforge.core.slots import optimizers
from shardforge.optim.groups import groups


@optimizers.register("adamw")
@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    beta1: float = option(0.9, "decay of the mean of the gradient", at_least=0, at_most=1)
    beta2: float = option(0.95, "decay of the mean of its square", at_least=0, at_most=1)
    eps: float = option(1e-8, "added to the root of the mean square", above=0)
    weight_decay: float = option(0.1, "share of a weight lost in a step, times the learning rate", at_least=0)
    decayed: tuple[Literal["matrix", "table", "vector"], ...] = option(
        ("matrix", "table"), "roles of weights that decay; a role follows from the weight's dimensions"
    )
    clip: float | None = option(1.0, "largest norm of the whole gradient; empty leaves it alone", above=0)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups(model, self.weight_decay, self.decayed),
            lr=0.0,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=True,
        )
