"""A constant learning rate after warm-up.

Paper: none.
Changes: lr(step) = lr after a linear warm-up.
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import schedules
from shardforge.optim.shape import warmed


@schedules.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant:
    lr: float = option(REQUIRED, "learning rate", above=0)
    warmup: int = option(0, "steps of linear warm-up", unit="steps", at_least=0)

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (0-based) of a run of `steps`."""
        return self.lr * warmed(step, self.warmup)
