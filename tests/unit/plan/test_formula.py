from __future__ import annotations

import pytest

from shardforge.core.errors import RecipeError
from shardforge.plan.formula import bubble_formula
from shardforge.plan.simulate import Cost
from tests.unit.plan.conftest import Run

EVEN, UNEVEN = Cost(), Cost(2.0, 3.0, 1.5)
SIZES = [(2, 4), (4, 8), (8, 16)]


@pytest.mark.parametrize(("pp", "micro"), SIZES)
@pytest.mark.parametrize("cost", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1), ("zero_bubble", 2)],
)
def test_the_simulation_has_the_published_bubble(
    schedule: str, chunks: int, cost: Cost, pp: int, micro: int, timeline: Run
):
    found = timeline(schedule, pp, micro, cost, chunks=chunks)
    assert found.bubble == pytest.approx(bubble_formula(schedule, pp, micro, chunks, cost), rel=1e-12)


@pytest.mark.parametrize(("pp", "micro"), SIZES)
def test_zbv_has_the_published_bubble_where_its_parts_cost_the_same(pp: int, micro: int, timeline: Run):
    found = timeline("zbv", pp, micro)
    assert found.bubble == pytest.approx(bubble_formula("zbv", pp, micro, 2), rel=1e-12)


def test_zbv_has_no_formula_for_other_costs():
    assert bubble_formula("zbv", 4, 8, 2, UNEVEN) is None


@pytest.mark.parametrize(("pp", "micro"), SIZES)
def test_dualpipev_has_the_published_bubble_where_its_parts_cost_the_same(pp: int, micro: int, timeline: Run):
    found = timeline("dualpipev", pp, micro)
    assert found.bubble == pytest.approx(bubble_formula("dualpipev", pp, micro, 2), rel=1e-12)


@pytest.mark.parametrize(("pp", "micro"), SIZES)
def test_dualpipev_waits_at_most_as_published_for_other_costs(pp: int, micro: int, timeline: Run):
    published = bubble_formula("dualpipev", pp, micro, 2, UNEVEN)
    assert 0.8 * published < timeline("dualpipev", pp, micro, UNEVEN).bubble <= published


def test_1f1b_waits_p_minus_1_of_m_plus_p_minus_1():
    assert bubble_formula("1f1b", 4, 8) == 3 / 11


def test_interleaving_divides_the_wait_by_the_stages_of_a_rank():
    assert bubble_formula("interleaved", 4, 8, 2) == 3 / (2 * 8 + 3)


def test_a_schedule_without_a_name_has_no_formula():
    with pytest.raises(RecipeError, match="no schedule is called 'two'"):
        bubble_formula("two", 4, 8)
