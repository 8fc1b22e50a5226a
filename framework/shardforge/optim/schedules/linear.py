"""A straight line from the peak to a floor, after warm-up.

Paper: Defazio et al. 2023, "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement", arXiv:2310.07831.
Changes: lr(step) = lr - (lr - floor) * progress.
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import schedules
from shardforge.optim.shape import progress, warmed


@schedules.register("linear")
@dataclass(frozen=True, kw_only=True)
class Linear:
    lr: float = option(REQUIRED, "peak learning rate", above=0)
    warmup: int = option(0, "steps of linear warm-up", unit="steps", at_least=0)
    floor: float = option(0.0, "learning rate at the end, as a share of the peak", at_least=0, at_most=1)

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (0-based) of a run of `steps`."""
        fall = 1 - progress(step, self.warmup, steps)
        return self.lr * warmed(step, self.warmup) * (self.floor + (1 - self.floor) * fall)
