from __future__ import annotations

import resource

import pytest

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.plan.dry_run import dry_run, report, stage_bytes, stage_ranks
from shardforge.plan.schedule import stages_of
from shardforge.recipe.load import load
from shardforge.recipe.schema import Recipe
from tests.tiny import tiny

V3 = "deepseek-v3-2048"


def staged(pp: int, layers: int, schedule: str = "1f1b") -> Recipe:
    return tiny(
        layout=Layout(pp=pp, dp_shard=2),
        model={"stack": [f"one x {layers}"], "vocab": 16},
        train={"steps": 1, "sequences": 8, "seq_len": 16, "micro_batch": 1},
        engine={"kind": "native", "schedule": schedule, "zero": 1},
    )


def test_each_pipeline_rank_is_shown_by_its_first_rank():
    assert stage_ranks(Layout(pp=4, dp_shard=2, tp=2)) == [0, 4, 8, 12]
    assert stage_ranks(Layout(pp=2, tp=4, order="rep-dp-cp-tp-pp")) == [0, 1]


def test_the_report_has_a_line_a_pipeline_rank_and_counts_every_weight():
    told: list[str] = []
    report(staged(4, 6), None, told.append)
    lines = "\n".join(told).splitlines()
    assert "tiny: 13,776 weights on 8 ranks as pp4-dp2, 2 a stage" in lines
    assert "the stages hold 13,776" in lines
    heading = next(index for index, line in enumerate(lines) if line.startswith("rank  stages"))
    assert [line.split()[0] for line in lines[heading + 1 : heading + 5]] == ["0", "2", "4", "6"]
    assert [line.split("=")[0].split()[-1] for line in lines[heading + 1 : heading + 5]] == ["4", "3", "2", "1"]


def test_equal_stages_are_run_once():
    told: list[str] = []
    report(staged(4, 4), None, told.append)
    assert [line for line in told if line.startswith("running")] == [
        "running rank 0: stage 0",
        "running rank 2: stage 1",
        "running rank 6: stage 3",
    ]


def test_one_rank_can_be_asked_for():
    told: list[str] = []
    report(staged(2, 2), 3, told.append)
    assert [line.split()[:3] for line in "\n".join(told).splitlines() if line.startswith("3 ")] == [["3", "1", "1"]]


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(LayoutError, match="the layout dp2 has no rank 2\n    fix: 0 to 1"):
        dry_run(tiny(layout=Layout(dp_shard=2)), 2)


def test_stages_of_another_cut_are_measured_once_for_equal_layers():
    recipe, seen = staged(2, 4), {}
    sizes = stage_bytes(recipe, stages_of(recipe, "interleaved", 2), seen)
    assert len(sizes) == 4 and len(seen) == 3
    assert sizes[1] == sizes[2] and sizes[0].kept != sizes[3].kept
    more = stage_bytes(recipe, stages_of(recipe, "1f1b", 2), seen)
    assert more[0].kept > sizes[0].kept


def test_a_split_backward_pass_holds_more_between_its_halves():
    recipe = staged(2, 4, "zbv")
    middle = stage_bytes(recipe, stages_of(recipe, "zbv", 2), {})[1]
    assert middle.halved > 1.2 * middle.kept


@pytest.mark.slow
def test_deepseek_v3_is_planned_on_2048_ranks():
    told: list[str] = []
    report(load(V3).recipe, None, told.append)
    text = "\n".join(told)
    assert "682,636,472,320 weights on 2,048 ranks as pp16-dp128-ep64, 128 a stage" in text
    assert "the stages hold 682,636,472,320" in text
    rows = [line.split() for line in text.splitlines() if line[:1].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(0, 2048, 128))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20  # KiB: nothing of it was stored
