from __future__ import annotations

import collections

import pytest
import torch
from torch.distributed.pipelining import schedules

from shardforge.core.errors import LayoutError, RecipeError
from shardforge.parallel.stages import ORDERS
from shardforge.plan.order import Action, _Stage, order, script
from tests.unit.plan.conftest import even


@pytest.mark.parametrize("schedule", ORDERS)
def test_each_micro_batch_goes_forward_and_backward_once_in_each_stage(schedule: str):
    rows = order(schedule, even(schedule, 4).ranks, 8)
    count = collections.Counter(action for row in rows for action in row)
    assert set(count.values()) == {1}
    for stage in range(len(even(schedule, 4))):
        for micro in range(8):
            assert Action("F", stage, micro) in count
            halves = {Action("I", stage, micro) in count, Action("W", stage, micro) in count}
            assert halves == {Action("B", stage, micro) not in count}


@pytest.mark.parametrize("schedule", ORDERS)
def test_a_rank_works_on_its_own_stages_only(schedule: str):
    stages = even(schedule, 4)
    for rank, row in enumerate(order(schedule, stages.ranks, 8)):
        assert {action.stage for action in row} == set(stages.held(rank))


@pytest.mark.parametrize("schedule", ORDERS)
def test_the_order_is_that_of_a_schedule_made_for_each_rank(schedule: str):
    stages, made = even(schedule, 4), getattr(schedules, ORDERS[schedule].runner)
    for rank, row in enumerate(script(schedule, stages.ranks, 8)):
        seen: list[Action] = []
        mine = [_Stage(stage, len(stages), rank, 4, seen) for stage in stages.held(rank)]
        runner = made(mine if hasattr(made, "register_custom_function") else mine[0], 8, loss_fn=torch.add)
        runner._initialize_stage = runner._initialize_stages = lambda *args, **kwargs: None
        runner._loss_fn = lambda out, target: out
        runner._step_microbatches([()] * 8, [{}] * 8, [None] * 8, None, False)
        assert row == seen


def test_the_last_rank_of_1f1b_begins_with_the_first_micro_batch():
    # torch's printed table of this schedule begins there with the second one; what runs does not
    assert order("1f1b", [0, 1], 2)[1] == [Action("F", 1, 0), Action("B", 1, 0), Action("F", 1, 1), Action("B", 1, 1)]


def test_a_misspelt_schedule_is_told_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no schedule is called '1f2b'\n +fix: did you mean '1f1b'\?"):
        order("1f2b", [0, 1], 2)


def test_too_few_micro_batches_are_refused():
    with pytest.raises(LayoutError, match="dualpipev over pp=2 cannot run 3 micro-batches"):
        order("dualpipev", even("dualpipev", 2).ranks, 3)


def test_a_result_is_handed_on_after_the_pair_that_dualpipev_works_on():
    row = script("dualpipev", even("dualpipev", 4).ranks, 8)[0]
    pair = next(n for n, action in enumerate(row) if action.work == "SB" and row[n - 1].work == "SF")
    assert {action.work for action in row[pair - 3 : pair - 1]} == {"F", "B"}
