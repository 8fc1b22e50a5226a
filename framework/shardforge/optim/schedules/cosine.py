"""Half a cosine from the peak to a floor, after warm-up.

Paper: Loshchilov and Hutter 2016, "SGDR", arXiv:1608.03983, eq. 5, without restarts.
Changes: lr(step) = floor + (lr - floor) * (1 + cos(pi * progress)) / 2. With `horizon` the fall is planned for so many
    steps, whatever the run's: OLMo 2 and Llama 3 ended before.
Cost: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import schedules
from shardforge.optim.shape import progress, warmed


@schedules.register("cosine")
@dataclass(frozen=True, kw_only=True)
class Cosine:
    lr: float = option(REQUIRED, "peak learning rate", above=0)
    warmup: int = option(0, "steps of linear warm-up", unit="steps", at_least=0)
    floor: float = option(0.1, "learning rate at the end, as a share of the peak", at_least=0, at_most=1)
    horizon: int | None = option(
        None, "step at which the floor is reached; empty: the end of the run", unit="steps", at_least=1
    )

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (0-based) of a run of `steps`."""
        fall = (1 + math.cos(math.pi * progress(step, self.warmup, self.horizon or steps))) / 2
        return self.lr * warmed(step, self.warmup) * (self.floor + (1 - self.floor) * fall)
