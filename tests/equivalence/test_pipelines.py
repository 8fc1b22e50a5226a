"""Law 4 over pipelines: every schedule, with every other axis, equals one process in float64 at 1e-10."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from shardforge.core.layout import Layout
from shardforge.parallel.stages import ORDERS
from tests.equivalence.cases import charged_two_steps, compiled_two_steps, two_steps
from tests.tiny import LENGTH, SEQUENCES, assert_same
from tests.tiny_kinds import OPTIONS

TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 1}
DEEP = {"model": {"stack": ["one x 4"]}}
CASES: dict[str, dict[str, Any]] = {
    "plain": DEEP,
    "deep": {"model": {"stack": ["one x 8"]}},
    "tied": {"model": {"stack": ["one x 4"], "head": "tied"}},
    "learned-tied-softcap": {
        "model": {
            "stack": ["one x 4"],
            "embedding": {"kind": "learned", "length": LENGTH},
            "head": {"kind": "softcap", "cap": 5.0, "head": "tied"},
        },
        "objective": {"kind": "next_token", "z_loss": 0.1},
    },
    "dropout": {"residual": {"kind": "pre", "dropout": 0.3}, "model": {"stack": ["one x 4"], "dropout": 0.2}},
    "two-blocks": {"model": OPTIONS["two-blocks"]["model"] | {"stack": ["near x 2", "far x 2"]}},
    "sinks": {"model": OPTIONS["sinks"]["model"] | {"stack": ["(near far) x 2"]}},
    "capped-scores": OPTIONS["capped-scores"] | {"model": {"stack": ["one x 4"]}},
}


@pytest.fixture(scope="module")
def alone(ranks):
    """name -> the two steps of one process, computed once."""
    return functools.cache(lambda name: ranks(1).run(two_steps, Layout(), CASES[name])[0])


def piped(ranks, layout: str, case: str, schedule: str, micro_batch: int = 1, run=two_steps, **engine: Any):
    wanted = Layout.parse(layout)
    engine = {"kind": "native", "schedule": schedule, "zero": 2} | engine
    changes = CASES[case] | {"engine": engine, "train": TRAIN | {"micro_batch": micro_batch}}
    return ranks(wanted.world_size).run(run, wanted, changes)[0]


@pytest.mark.parametrize("schedule", ORDERS)
def test_every_schedule_equals_one_process(ranks, alone, schedule):
    assert_same(piped(ranks, "pp2", "plain", schedule), alone("plain"))


@pytest.mark.parametrize(
    ("layout", "schedules"),
    [
        ("pp4", ["gpipe", "1f1b", "zbv"]),
        ("pp2-dp2", ["1f1b", "interleaved", "zero_bubble", "dualpipev"]),
        ("pp2-tp2", ["1f1b", "zbv"]),
        ("pp2-rep2", ["1f1b", "zbv"]),
        ("pp2-cp2", ["interleaved", "dualpipev"]),
    ],
)
def test_a_pipeline_of_other_axes_equals_one_process(ranks, alone, layout, schedules):
    case = "deep" if layout == "pp4" else "plain"
    for schedule in schedules:
        assert_same(piped(ranks, layout, case, schedule), alone(case))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2-dp2-tp2", "pp2-rep2-tp2", "pp2-cp2-tp2", "pp4-tp2"])
@pytest.mark.parametrize("schedule", ORDERS)
def test_a_pipeline_over_eight_ranks_equals_one_process(ranks, alone, layout, schedule):
    case = "deep" if layout == "pp4-tp2" else "tied"
    assert_same(piped(ranks, layout, case, schedule), alone(case))


@pytest.mark.parametrize(
    ("layout", "schedules"),
    [
        ("pp2", ["1f1b", "interleaved", "zbv"]),
        ("pp2-dp2", ["1f1b", "zbv"]),
        ("pp2-tp2", ["zero_bubble", "dualpipev"]),
    ],
)
def test_a_head_tied_to_an_embedding_of_another_stage_trains_as_one_weight(ranks, alone, layout, schedules):
    for schedule in schedules:
        assert_same(piped(ranks, layout, "tied", schedule), alone("tied"))


@pytest.mark.parametrize(("layout", "schedule"), [("pp2-tp2", "1f1b"), ("pp2-dp2", "dualpipev")])
def test_terms_of_the_objective_come_from_the_last_stage(ranks, alone, layout, schedule):
    assert_same(piped(ranks, layout, "learned-tied-softcap", schedule), alone("learned-tied-softcap"))


@pytest.mark.parametrize(
    ("layout", "schedule", "context"),
    [
        ("pp2", "zero_bubble", "auto"),
        ("pp2-tp2", "zbv", "auto"),
        ("pp2-cp2", "zbv", "auto"),
        ("pp2-cp2", "1f1b", "ring"),
    ],
)
def test_sinks_of_every_stage_hear_of_its_micro_batches(ranks, alone, layout, schedule, context):
    assert_same(piped(ranks, layout, "sinks", schedule, context=context), alone("sinks"))


@pytest.mark.parametrize(("layout", "schedule", "context"), [("pp2-tp2", "zbv", "auto"), ("pp2-cp2", "1f1b", "ring")])
def test_scores_of_every_stage_are_bent(ranks, alone, layout, schedule, context):
    assert_same(piped(ranks, layout, "capped-scores", schedule, context=context), alone("capped-scores"))


@pytest.mark.parametrize(("layout", "schedule"), [("pp2", "zero_bubble"), ("pp2-tp2", "interleaved")])
def test_stages_drop_what_one_process_drops(ranks, alone, layout, schedule):
    assert_same(piped(ranks, layout, "dropout", schedule), alone("dropout"))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_stages_equal_one_process(ranks, alone, recompute, schedule):
    assert_same(piped(ranks, "pp2-dp2", "dropout", schedule, recompute=recompute, zero=3), alone("dropout"))


@pytest.mark.parametrize(("zero", "schedule"), [(1, "1f1b"), (1, "zbv"), (3, "gpipe"), (3, "1f1b"), (3, "interleaved")])
def test_what_is_sharded_inside_a_stage_changes_nothing(ranks, alone, zero, schedule):
    assert_same(piped(ranks, "pp2-dp2", "plain", schedule, zero=zero), alone("plain"))


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("1f1b", "0 | 4"),
        ("1f1b", "4 | 0"),
        ("interleaved", "1 x 4"),
        ("interleaved", "0 | 1 x 4 | 0"),
        ("zbv", "2|1|1|0"),
    ],
)
def test_any_cut_of_the_layers_equals_one_process(ranks, alone, schedule, stages):
    assert_same(piped(ranks, "pp2", "two-blocks", schedule, stages=stages), alone("two-blocks"))


@pytest.mark.parametrize(("schedule", "micro_batch"), [("gpipe", 8), ("1f1b", 2), ("interleaved", 4), ("zbv", 8)])
def test_micro_batches_of_any_size_equal_one_process(ranks, alone, schedule, micro_batch):
    assert_same(piped(ranks, "pp2", "plain", schedule, micro_batch), alone("plain"))


@pytest.mark.parametrize(("layout", "schedule"), [("pp2", "1f1b"), ("pp2", "zbv"), ("pp2-dp2", "zero_bubble")])
def test_losses_and_records_of_blocks_come_from_every_stage(ranks, layout, schedule):
    expected = ranks(1).run(charged_two_steps, Layout(), CASES["plain"])[0]
    plain = ranks(1).run(two_steps, Layout(), CASES["plain"])[0]
    assert (expected["0 grad embed.weight"] - plain["0 grad embed.weight"]).norm() > 1e-3
    assert_same(piped(ranks, layout, "plain", schedule, run=charged_two_steps), expected)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_compiled_stages_equal_one_process(ranks, alone, schedule):
    got = piped(ranks, "pp2", "plain", schedule, run=compiled_two_steps, compiled=True)
    assert torch.is_tensor(got.pop("graphs"))
    assert_same(got, alone("plain"))
