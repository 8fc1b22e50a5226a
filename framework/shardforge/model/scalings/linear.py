"""Position interpolation: every pair turns slower by the same factor, as if positions lay closer together.

Paper: Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation",
    arXiv:2306.15595.
Changes: rate / factor.
Cost: nothing.
Limits: neighbouring positions are harder to tell apart; short sequences lose a little until trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import rope_scalings
from shardforge.model.scaling import Scaling, frequencies


@rope_scalings.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearScaling(Scaling):
    factor: float = option(REQUIRED, "new length over the length of the first training", at_least=1)

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        return frequencies(base, width, device) / self.factor
