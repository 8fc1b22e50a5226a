"""Stops a run whose numbers are lost before they reach the weights of the next checkpoint."""

from __future__ import annotations

import math

from shardforge.core.errors import EngineError
from shardforge.engine.base import Losses, UpdateStats


def check(step: int, losses: Losses, update: UpdateStats) -> None:
    """EngineError when loss or gradient norm of `step` (0-based) is not finite. Equal on all ranks."""
    wrong = {"loss": losses.loss, "gradient norm": update.grad_norm}
    odd = {name: value for name, value in wrong.items() if not math.isfinite(value)}
    if odd:
        raise EngineError(
            " and ".join(f"{name} is {value}" for name, value in odd.items()),
            f"step {step}",
            "the last checkpoint is from before; lower schedule.lr, lengthen schedule.warmup, or add "
            "objective.z_loss, and start again",
        )
