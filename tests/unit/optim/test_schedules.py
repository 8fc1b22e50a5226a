from __future__ import annotations

import math
from itertools import pairwise

import pytest

from shardforge.core.errors import RecipeError
from shardforge.core.slots import schedules
from shardforge.optim.schedules.constant import Constant
from shardforge.optim.schedules.cosine import Cosine
from shardforge.optim.schedules.linear import Linear
from shardforge.optim.schedules.phases import PhasesConfig, Piece
from shardforge.optim.schedules.wsd import WSD
from shardforge.optim.shape import progress, warmed

STEPS, WARMUP, LR, FLOOR = 200, 20, 0.5, 0.1
PIECES = (
    Piece(until=0.5, lr=LR),
    Piece(until=0.75, lr=LR / 2, curve="cosine"),
    Piece(until=0.9, lr=LR / 5),
    Piece(until=1.0, lr=LR * FLOOR, curve="linear"),
)
FALLING = {
    "cosine": Cosine(lr=LR, warmup=WARMUP, floor=FLOOR),
    "linear": Linear(lr=LR, warmup=WARMUP, floor=FLOOR),
    "phases": PhasesConfig(pieces=PIECES, warmup=WARMUP),
    **{f"wsd-{curve}": WSD(lr=LR, warmup=WARMUP, floor=FLOOR, curve=curve) for curve in ("linear", "sqrt", "cosine")},
}
ALL = {"constant": Constant(lr=LR, warmup=WARMUP)} | FALLING


@pytest.mark.parametrize("name", ALL)
def test_the_first_step_already_learns(name):
    assert ALL[name].at(0, STEPS) == pytest.approx(LR / WARMUP)


@pytest.mark.parametrize("name", ALL)
def test_warm_up_is_a_line_that_ends_at_the_peak(name):
    rates = [ALL[name].at(step, STEPS) for step in range(WARMUP + 1)]
    assert rates[:WARMUP] == pytest.approx([LR * (step + 1) / WARMUP for step in range(WARMUP)])
    assert rates[WARMUP] == pytest.approx(LR)


@pytest.mark.parametrize("name", FALLING)
def test_the_end_is_the_floor(name):
    assert FALLING[name].at(STEPS, STEPS) == pytest.approx(LR * FLOOR)


@pytest.mark.parametrize("name", FALLING)
def test_after_warm_up_the_rate_never_rises(name):
    rates = [FALLING[name].at(step, STEPS) for step in range(WARMUP, STEPS)]
    assert all(later <= before for before, later in pairwise(rates))


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd-linear", "wsd-cosine"])
def test_no_step_changes_the_rate_by_more_than_a_tenth_of_the_peak(name):
    rates = [ALL[name].at(step, STEPS) for step in range(STEPS + 1)]
    assert max(abs(later - before) for before, later in pairwise(rates)) < LR / 10


def test_the_first_step_of_a_sqrt_decay_is_its_largest():
    decay = STEPS // 10
    rates = [FALLING["wsd-sqrt"].at(step, STEPS) for step in range(STEPS - decay, STEPS + 1)]
    falls = [before - later for before, later in pairwise(rates)]
    assert max(falls) == falls[0] == pytest.approx(LR * (1 - FLOOR) / math.sqrt(decay))


@pytest.mark.parametrize("name", ALL)
def test_a_rate_depends_on_nothing_but_the_step(name):
    forward = [ALL[name].at(step, STEPS) for step in range(STEPS)]
    backward = [ALL[name].at(step, STEPS) for step in reversed(range(STEPS))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (2, 2), (4, 4), (0, 3), (20, 20), (20, 21)])
def test_short_runs_have_a_rate_at_every_step(name, warmup, steps):
    schedule = type(ALL[name])(**vars(ALL[name]) | {"warmup": warmup})
    assert all(0 < schedule.at(step, steps) <= LR for step in range(steps))


def test_cosine_is_halfway_in_the_middle():
    assert FALLING["cosine"].at(WARMUP + (STEPS - WARMUP) // 2, STEPS) == pytest.approx(LR * (1 + FLOOR) / 2)


def test_linear_is_halfway_in_the_middle():
    assert FALLING["linear"].at(WARMUP + (STEPS - WARMUP) // 2, STEPS) == pytest.approx(LR * (1 + FLOOR) / 2)


@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
def test_wsd_is_constant_until_its_decay(decay):
    schedule = WSD(lr=LR, decay=decay)
    stable = round(STEPS * (1 - decay))
    assert {schedule.at(step, STEPS) for step in range(stable + 1)} == {LR}
    assert schedule.at(stable + 1, STEPS) < LR


@pytest.mark.parametrize(
    ("step", "rate"),
    [(99, LR), (100, LR), (125, 0.75 * LR), (149, None), (150, LR / 5), (179, LR / 5), (190, 0.15 * LR), (199, None)],
)
def test_phases_hold_fall_and_jump_where_their_pieces_end(step, rate):
    found = FALLING["phases"].at(step, STEPS)
    assert found == pytest.approx(rate) if rate else LR * FLOOR < found < LR


def test_a_piece_of_a_line_or_a_cosine_begins_at_the_rate_before():
    line = PhasesConfig(pieces=(Piece(until=0.5, lr=1.0), Piece(until=1.0, lr=0.0, curve="linear")))
    assert [line.at(step, 8) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        ([], "there is no piece"),
        ([(1.0, "cosine")], "the first piece is cosine, and there is no rate before it"),
        ([(0.5, "constant"), (0.5, "linear"), (1.0, "linear")], "a piece until 0.5 comes after one until 0.5"),
        ([(0.8, "constant"), (0.4, "linear"), (1.0, "linear")], "a piece until 0.4 comes after one until 0.8"),
        ([(0.5, "constant")], "the pieces end at 0.5 of the steps"),
    ],
)
def test_pieces_that_make_no_course_are_refused(pieces, told):
    with pytest.raises(RecipeError, match=told):
        PhasesConfig(pieces=tuple(Piece(until=until, lr=LR, curve=curve) for until, curve in pieces))


def test_a_cosine_with_a_horizon_does_not_depend_on_the_length_of_the_run():
    long, cut = Cosine(lr=LR, warmup=WARMUP), Cosine(lr=LR, warmup=WARMUP, horizon=STEPS)
    assert [cut.at(step, STEPS // 2) for step in range(STEPS)] == [long.at(step, STEPS) for step in range(STEPS)]


def test_every_registered_schedule_is_tested_here():
    assert {type(schedule) for schedule in ALL.values()} == set(schedules.kinds().values())


@pytest.mark.parametrize(
    ("step", "begin", "end", "share"),
    [(0, 10, 20, 0), (10, 10, 20, 0), (15, 10, 20, 0.5), (20, 10, 20, 1), (99, 10, 20, 1), (5, 9, 9, 0), (9, 9, 9, 1)],
)
def test_progress_is_0_before_1_after_and_a_line_between(step, begin, end, share):
    assert progress(step, begin, end) == share


def test_no_warm_up_is_at_the_peak_at_once():
    assert warmed(0, 0) == 1.0
