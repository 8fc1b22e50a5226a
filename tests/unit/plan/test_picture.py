from __future__ import annotations

import pytest

from shardforge.parallel.stages import ORDERS
from shardforge.plan.picture import picture
from shardforge.plan.simulate import Cost
from tests.unit.plan.conftest import Run


def test_a_line_a_rank_and_a_cell_an_action(timeline: Run):
    assert picture(timeline("1f1b", 2, 4)) == [
        "rank 0  F0 F1 .  .  B0--- F2 B1--- F3 B2--- .  B3---",
        "rank 1  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- .  .",
        "F forward, B backward, with its micro-batch; . waits",
        "the shortest action takes 3 columns",
    ]


def test_later_stages_of_a_rank_are_in_lower_case(timeline: Run):
    lines = picture(timeline("zbv", 2, 4))
    assert lines[1].startswith("rank 1  .  F0 f0 F1 f1 i0 w0 F2 I0 W0")
    assert lines[3] == "lower case: later stages of the rank"


@pytest.mark.parametrize("schedule", ORDERS)
@pytest.mark.parametrize("cost", [Cost(), Cost(1.0, 1.37, 0.71)], ids=["even", "uneven"])
def test_no_line_is_wider_than_the_page(schedule: str, cost: Cost, timeline: Run):
    lines = picture(timeline(schedule, 8, 64, cost))
    assert max(len(line) for line in lines) <= 120


def test_a_long_schedule_keeps_its_ends_and_tells_what_is_left_out(timeline: Run):
    lines = picture(timeline("1f1b", 2, 64))
    assert lines[0].startswith("rank 0  F0- F1- .") and lines[0].endswith("B63----")
    assert "units of time are left out at the ~" in lines[-1]


def test_a_short_schedule_is_not_said_to_be_shortened(timeline: Run):
    assert "left out" not in "\n".join(picture(timeline("gpipe", 2, 4)))


def test_a_longer_action_has_a_longer_cell(timeline: Run):
    first = picture(timeline("gpipe", 2, 2, Cost(1.0, 2.0, 2.0)))[1]
    assert first.split() == ["rank", "1", ".", "F0", "F1", "B0---------", "B1---------", *"...."]
