from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shardforge.core.layout import Layout
from shardforge.observe.base import Slow
from shardforge.train import pace
from shardforge.train.pace import Pace, Review, outliers
from shardforge.train.verdict import Paced

DP4 = Layout(dp_shard=4)
USUAL = Paced(steps=10, seconds=20.0, worked=10.0, data=1.0)
"""A step of 2 s, of which half is own work."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def waiting(monkeypatch) -> list[bool]:
    """Whether the main thread is in a collective: the last entry."""
    found = [False]
    monkeypatch.setattr(pace, "in_collective", lambda thread: found[-1])
    return found


def spend(mine: Pace, clock: Clock, seconds: float) -> None:
    for _ in range(round(seconds / pace.TICK_S)):
        clock.now += pace.TICK_S
        mine.look(0)


def test_own_work_is_the_step_without_the_time_in_collectives(clock, waiting):
    mine = Pace(clock)
    for _ in range(3):
        with mine:
            spend(mine, clock, 1.0)
            waiting.append(True)
            spend(mine, clock, 2.0)
            waiting.append(False)
            spend(mine, clock, 1.0)
    assert mine.sums == Paced(3, pytest.approx(12.0), pytest.approx(6.0))


def test_what_happens_between_steps_is_no_part_of_them(clock, waiting):
    mine = Pace(clock)
    waiting.append(True)
    for _ in range(2):
        spend(mine, clock, 5.0)
        with mine:
            spend(mine, clock, 1.0)
    assert mine.sums == Paced(2, pytest.approx(2.0), pytest.approx(0.0))


def test_a_process_that_was_stopped_did_not_wait_in_a_collective(clock, waiting):
    mine = Pace(clock)
    waiting.append(True)
    with mine:
        mine.look(0)
        clock.now += 1000.0
        mine.look(0)
    assert mine.sums.worked > 999


def test_waiting_for_data_is_summed(clock):
    mine = Pace(clock)
    for _ in range(2):
        with mine:
            mine.waited_for_data(0.25)
    assert mine.sums.data == 0.5


def test_a_cpu_is_never_probed(monkeypatch):
    monkeypatch.setattr(pace.peak, "measure", lambda *asked: pytest.fail("probed"))
    mine = Pace()
    mine.probes(torch.device("cpu"), torch.float32)
    with mine:
        pass


def test_a_gpu_is_probed_at_the_same_steps_on_every_rank(monkeypatch):
    asked: list[int] = []
    mine = Pace()
    monkeypatch.setattr(pace.peak, "measure", lambda *how: asked.append(mine.sums.steps) or 7.0)
    mine.probes(torch.device("cuda", 0), torch.bfloat16)
    for _ in range(2 * pace.PROBE_EVERY + 1):
        with mine:
            pass
    assert asked == [0, pace.PROBE_EVERY, 2 * pace.PROBE_EVERY] and mine.sums.rate == 7.0


def test_a_probe_for_which_there_is_no_memory_ends_no_training(monkeypatch):
    def full(*how: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pace.peak, "measure", full)
    mine = Pace()
    mine.probes(torch.device("cuda", 0), torch.bfloat16)
    with mine:
        pass
    assert mine.sums == replace(mine.sums, steps=1, rate=0.0)


def test_a_step_that_fails_says_so_itself(monkeypatch):
    monkeypatch.setattr(pace.peak, "measure", lambda *how: pytest.fail("probed"))
    mine = Pace()
    mine.probes(torch.device("cuda", 0), torch.bfloat16)
    with pytest.raises(ValueError, match="a bug"), mine:
        raise ValueError("a bug")


def means(**others: float) -> dict[int, Paced]:
    """Four ranks, of which the last is different."""
    one = Paced(1, 2.0, 1.0, 0.1, 600e12)
    return {0: one, 1: one, 2: one, 3: replace(one, **others)}


@pytest.mark.parametrize(
    ("field", "value", "measure", "usual"),
    [("worked", 1.5, "work", 1.0), ("data", 0.8, "data", 0.1), ("rate", 300e12, "device", 600e12)],
)
def test_a_rank_that_holds_the_others_up_is_an_outlier_in_what_it_lacks(field, value, measure, usual):
    assert outliers(means(**{field: value})) == [(measure, 3, value, usual)]


@pytest.mark.parametrize(
    "others",
    [{}, {"worked": 0.2}, {"worked": 1.2}, {"data": 0.19}, {"rate": 500e12}, {"rate": 900e12}],
    ids=["alike", "quick", "a little slower", "data that costs nothing", "a little weaker", "stronger"],
)
def test_nobody_else_is(others):
    assert outliers(means(**others)) == []


def test_of_two_ranks_the_slower_one_is_the_outlier():
    assert outliers({0: Paced(1, 2.0, 1.9), 1: Paced(1, 2.0, 0.5)}) == [("work", 0, 1.9, 0.5)]


def told(**others: float) -> dict[int, tuple[str, Paced]]:
    """What four ranks have summed up: the second time a comparison is made, over ten further steps."""
    twice = Paced(20, 40.0, 20.0, 2.0)
    ranks = {rank: (f"node{rank // 2}", twice) for rank in range(4)}
    return ranks | {3: ("node1", replace(twice, **others))}


def first() -> dict[int, tuple[str, Paced]]:
    return {rank: (f"node{rank // 2}", USUAL) for rank in range(4)}


def test_the_first_rank_names_outliers_with_place_and_node_over_the_last_steps():
    review = Review(DP4)
    assert review.of(first()) == ()
    assert review.of(told(worked=28.0)) == (Slow(3, "dp3", "node1", "work", 1.8, 1.0),)


def test_what_was_slow_before_and_is_not_any_more_is_forgotten():
    review = Review(DP4)
    review.of(first() | {3: ("node1", replace(USUAL, worked=19.0))})
    assert review.of(told(worked=29.0)) == ()


@pytest.mark.parametrize("ranks", [told(steps=14), {0: ("node0", USUAL)}], ids=["too few steps", "ranks are missing"])
def test_a_comparison_that_would_say_little_is_not_made(ranks):
    review = Review(DP4)
    review.of(first())
    assert review.of(ranks) == ()


def test_stages_of_a_pipeline_are_not_compared():
    review = Review(Layout(pp=2, dp_shard=2))
    review.of(first())
    slow_stage = {rank: (node, replace(sums, worked=36.0)) for rank, (node, sums) in told().items() if rank > 1}
    assert review.of(told() | slow_stage) == ()


def test_a_comparison_comes_after_its_time_and_not_before(clock):
    review = Review(DP4, clock)
    assert not review.due()
    clock.now = pace.REVIEW_S
    assert review.due()
    review.of(first())
    assert not review.due()
