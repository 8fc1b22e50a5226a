"""The scaling of Llama 3.1: pairs that turn often keep their rates, slow ones are interpolated, a ramp lies between.

Paper: Llama team 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.4.2; the formula is that of the
    released models.
Changes: a pair that turns r times in `original_length` positions has rate * ((1 - t)/factor + t), where t goes from 0
    at r = low_freq_factor to 1 at r = high_freq_factor.
Cost: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import rope_scalings
from shardforge.model.scaling import Scaling, frequencies


@rope_scalings.register("llama3")
@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(Scaling):
    factor: float = option(REQUIRED, "how much slower the slowest pairs turn", at_least=1)
    original_length: int = option(REQUIRED, "length of the first training", unit="tokens", at_least=1)
    low_freq_factor: float = option(1.0, "turns in that length below which a pair is interpolated", above=0)
    high_freq_factor: float = option(4.0, "turns in that length above which a pair stays", above=0)

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            raise RecipeError(
                f"low_freq_factor={self.low_freq_factor} is not below high_freq_factor={self.high_freq_factor}",
                fix="the published pair is 1.0 and 4.0",
            )

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        plain = frequencies(base, width, device)
        turns = self.original_length * plain / (2 * math.pi)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return plain * ((1 - kept) / self.factor + kept)
