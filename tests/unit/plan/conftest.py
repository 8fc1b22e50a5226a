from __future__ import annotations

from collections.abc import Callable

import pytest

from shardforge.parallel.stages import ORDERS, Stages, Work
from shardforge.plan.simulate import Cost, Timeline, simulate

Run = Callable[..., Timeline]


def even(schedule: str, pp: int, chunks: int | None = None) -> Stages:
    """Stages of one layer each, of equal work."""
    count = pp * (chunks or ORDERS[schedule].stages)
    return Stages(schedule, pp, (1,) * count, Work(0.0, (1.0,) * count, 0.0))


@pytest.fixture
def timeline() -> Run:
    """A schedule over even stages; `cost` is that of one stage."""

    def run(schedule: str, pp: int, micro: int, cost: Cost = Cost(), latency: float = 0.0, **more: int) -> Timeline:  # noqa: B008
        stages = even(schedule, pp, **more)
        return simulate(schedule, stages.ranks, micro, [cost] * len(stages), latency)

    return run
