"""Warm-up, stable, decay: constant for most of the run, then a short fall.

Paper: Hu et al. 2024, "MiniCPM", arXiv:2404.06395, section 4; the 1 - sqrt curve is Hägele et al. 2024,
    "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", arXiv:2405.18392.
Changes: lr(step) = lr, and over the last `decay` share of the steps lr falls to the floor along `curve`.
Cost: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import schedules
from shardforge.optim.shape import progress, warmed


@schedules.register("wsd")
@dataclass(frozen=True, kw_only=True)
class WSD:
    lr: float = option(REQUIRED, "stable learning rate", above=0)
    warmup: int = option(0, "steps of linear warm-up", unit="steps", at_least=0)
    decay: float = option(0.1, "share of the steps that decay", above=0, at_most=1)
    floor: float = option(0.0, "learning rate at the end, as a share of the stable one", at_least=0, at_most=1)
    curve: Literal["linear", "sqrt", "cosine"] = option("sqrt", "how it falls: linear, 1 - sqrt, or half a cosine")

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (0-based) of a run of `steps`."""
        done = progress(step, round(steps * (1 - self.decay)), steps)
        left = {
            "linear": 1 - done,
            "sqrt": 1 - math.sqrt(done),
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }[self.curve]
        return self.lr * warmed(step, self.warmup) * (self.floor + (1 - self.floor) * left)
