from __future__ import annotations

import pytest

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.plan import schedule
from shardforge.plan.rank import StageBytes
from shardforge.plan.simulate import Cost
from tests.tiny import tiny
from tests.unit.plan.conftest import even


def test_the_stages_of_the_recipe_are_its_own_under_its_own_schedule_only():
    recipe = tiny(
        layout=Layout(pp=2),
        model={"stack": ["one x 8"]},
        train={"steps": 1, "sequences": 8, "seq_len": 16, "micro_batch": 1},
        engine={"kind": "native", "schedule": "1f1b", "stages": "7 | 1"},
    )
    assert schedule.stages_of(recipe, "1f1b", 2).layers == (7, 1)
    assert schedule.stages_of(recipe, "gpipe", 2).layers == (4, 4)
    assert len(schedule.stages_of(recipe, "zbv", 2)) == 4


def test_more_stages_than_layers_are_refused():
    with pytest.raises(LayoutError, match="interleaved over pp=2 makes 4 stages of 2 layers"):
        schedule.stages_of(tiny(), "interleaved", 2)


def test_one_rank_has_no_schedule():
    with pytest.raises(LayoutError, match=r"one rank needs no schedule: parallel.pp is 1"):
        schedule.stages_of(tiny(), "1f1b", 1)


def test_a_stage_costs_its_share_of_the_flop_and_a_mean_rank_the_given_cost():
    stages = schedule.stages_of(tiny(model={"stack": ["one x 4"]}), "zbv", 2)
    costs = schedule.even_costs(stages, Cost(1.0, 2.0, 1.0))
    assert sum(cost.total for cost in costs) == pytest.approx(2 * 4.0)
    assert costs[0].forward / costs[3].forward == pytest.approx(stages.cost(0) / stages.cost(3))


def test_micro_batches_are_the_share_of_a_data_rank():
    train = {"steps": 1, "sequences": 24, "seq_len": 16, "micro_batch": 2}
    assert schedule.micro_batches_of(tiny(layout=Layout(pp=2, dp_shard=2), train=train)) == 6
    assert schedule.micro_batches_of(tiny(), 5) == 5


def test_schedules_are_compared_in_one_table():
    size = StageBytes(0, 1024, 2048, 4096)
    plans = []
    for name in ("gpipe", "zero_bubble"):
        stages = even(name, 2)
        plans.append(schedule.plan(stages, 4, [Cost() * (2 / len(stages))] * len(stages), [size] * len(stages)))
    heading, gpipe, zero, note = schedule.table(plans)
    assert gpipe.split() == ["gpipe", "2", "4", "1.200", "20.0%", "20.0%", "4", "4.00", "KiB"]
    assert zero.split()[:7] == ["zero_bubble", "4", "4", "1.000", "4.0%", "4.0%", "2"]
    assert zero.split()[7:] == ["6.00", "KiB"]  # of four micro-batches in a stage, two are between their halves
    assert len({len(line) for line in (heading, gpipe, zero)}) == 1 and note.startswith("even stages")


def test_each_rank_has_its_stages_its_wait_and_what_it_holds():
    each = schedule.plan(even("1f1b", 2), 4, [Cost()] * 2)
    lines = [line.split() for line in schedule.per_rank(each)]
    assert lines[1:] == [["0", "0", "1", "20.0%", "2", "micro-batches"], ["1", "1", "1", "20.0%", "1", "micro-batches"]]
