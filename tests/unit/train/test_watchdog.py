from __future__ import annotations

import math

import pytest

from shardforge.core.errors import EngineError
from shardforge.engine.base import Losses, UpdateStats
from shardforge.train import watchdog


def check(loss: float = 1.0, norm: float = 1.0) -> None:
    watchdog.check(41, Losses(loss, {}, 10), UpdateStats(norm))


def test_finite_numbers_pass():
    check(loss=1e30, norm=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "field"), [("loss", "loss"), ("gradient norm", "norm")])
def test_a_number_that_is_not_finite_stops_the_run_at_its_step(name, field, bad):
    with pytest.raises(EngineError, match=rf"step 41  {name} is {bad}"):
        check(**{field: bad})


def test_both_numbers_are_told_and_what_to_do():
    with pytest.raises(EngineError, match=r"loss is nan and gradient norm is inf(.|\n)*fix: .*lower schedule.lr"):
        check(math.nan, math.inf)
