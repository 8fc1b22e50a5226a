from __future__ import annotations

import pytest

from shardforge.parallel.stages import ORDERS
from shardforge.plan.simulate import Cost, simulate
from tests.unit.plan.conftest import Run, even


def test_1f1b_over_two_ranks_takes_the_times_worked_out_by_hand(timeline: Run):
    found = timeline("1f1b", 2, 2)
    times = [[(span.action.work, span.action.micro, span.start, span.end) for span in row] for row in found.spans]
    assert times == [
        [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 4, 6), ("B", 1, 7, 9)],
        [("F", 0, 1, 2), ("B", 0, 2, 4), ("F", 1, 4, 5), ("B", 1, 5, 7)],
    ]
    assert (found.time, found.bubbles, found.bubble) == (9, (1 / 3, 1 / 3), 1 / 3)


def test_a_message_delays_its_receiver(timeline: Run):
    assert timeline("gpipe", 2, 1, latency=0.25).time == timeline("gpipe", 2, 1).time + 2 * 0.25


def test_stages_of_one_rank_send_no_message(timeline: Run):
    slow, fast = timeline("zbv", 2, 4, latency=0.5), timeline("zbv", 2, 4)
    turn = [next(s.start for s in found.spans[1] if s.action == ("F", 2, 0)) for found in (slow, fast)]
    assert turn[0] - turn[1] == 0.5  # stage 1 heard from stage 0; stage 2 is on the rank of stage 1


@pytest.mark.parametrize("schedule", ORDERS)
def test_ranks_do_all_the_work_and_wait_the_rest(schedule: str, timeline: Run):
    found = timeline(schedule, 4, 8, Cost(2.0, 3.0, 1.5))
    for rank in range(4):
        assert found.time - found.idle(rank) == pytest.approx(8 * found.chunks * 6.5)


def test_a_rank_with_less_work_waits_longer():
    stages = even("1f1b", 2)
    found = simulate("1f1b", stages.ranks, 4, [Cost(), Cost() * 0.5])
    assert found.bubbles[1] > 0.5 > found.bubbles[0]


@pytest.mark.parametrize(
    ("schedule", "peaks"),
    [("gpipe", (8, 8, 8, 8)), ("1f1b", (4, 3, 2, 1)), ("interleaved", (5.5, 4.5, 3.5, 2.5)), ("zbv", (4, 4, 4, 4))],
)
def test_each_rank_holds_the_activations_of_its_schedule(schedule: str, peaks: tuple[float, ...], timeline: Run):
    found = timeline(schedule, 4, 8)
    assert found.peaks([1 / found.chunks] * len(found.stages)) == peaks


def test_activations_of_a_split_backward_pass_live_until_its_second_half(timeline: Run):
    found = timeline("zero_bubble", 2, 4)
    last = found.spans[0][-1]
    assert last.action.work == "W"
    (_, held), end = found.live(0, [1] * 4)[-2:]
    assert (held, end) == (1, (last.end, 0))


def test_bytes_of_uneven_stages_are_added(timeline: Run):
    assert timeline("1f1b", 2, 4).peaks([100, 7]) == (200, 7)
