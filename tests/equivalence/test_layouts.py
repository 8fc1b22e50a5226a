"""Law 4: any layout equals one process in loss, every gradient, clip norm and weights, in float64 at 1e-10."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest

from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from tests.equivalence.cases import compare, compiled_two_steps, two_steps
from tests.tiny import LENGTH, SEQUENCES, assert_same, tiny
from tests.tiny_kinds import GQA, OPTIONS, variants

LAYOUTS = ["dp2", "tp2", "dp4", "rep2-dp2", "tp4", "dp2-tp2", "rep2-tp2"]
CASES = variants() | OPTIONS
TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
AXES: dict[str, dict[str, Any]] = {
    "accumulated": {"train": TRAIN | {"micro_batch": 1}},
    "recompute-full": {"engine": {"kind": "native", "recompute": "full"}},
    "recompute-selective": {"engine": {"kind": "native", "recompute": "selective"}},
    "kept-gathered": {"engine": {"kind": "native", "zero": 2}},
    "accumulated-recompute-full": {
        "train": TRAIN | {"micro_batch": 2},
        "engine": {"kind": "native", "recompute": "full"},
    },
}
"""How a step is computed, which must not change what is computed."""


@pytest.fixture(scope="module")
def alone(ranks):
    """name -> the two steps of one process, computed once."""
    return functools.cache(lambda name: ranks(1).run(two_steps, Layout(), CASES[name])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_any_layout_equals_one_process(ranks, alone, case, layout):
    compare(ranks, alone(case), layout, CASES[case])


@pytest.mark.parametrize(("layout", "order"), [("dp2-cp2", "pp-rep-cp-dp-tp"), ("dp2-tp2-ep4", "tp-rep-pp-cp-dp")])
def test_any_order_of_ranks_equals_one_process(ranks, alone, layout, order):
    wanted = replace(Layout.parse(layout), order=order)
    assert_same(ranks(4).run(two_steps, wanted, CASES["ffn-moe"])[0], alone("ffn-moe"))


@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
@pytest.mark.parametrize("axis", AXES)
def test_how_a_step_is_computed_does_not_change_it(ranks, alone, axis, layout):
    compare(ranks, alone("dropout"), layout, OPTIONS["dropout"] | AXES[axis])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "dp2-tp2"])
@pytest.mark.parametrize("axis", ["plain", "recompute-full"])
def test_compiled_blocks_equal_eager_ones(ranks, alone, axis, layout):
    engine = AXES.get(axis, {}).get("engine", {"kind": "native"}) | {"compiled": True}
    wanted = Layout.parse(layout)
    changes = OPTIONS["grouped-heads"] | {"engine": engine}
    got = ranks(wanted.world_size).run(compiled_two_steps, wanted, changes)[0]
    got.pop("graphs")
    assert_same(got, alone("grouped-heads"))


def test_a_layout_that_cannot_split_the_heads_is_refused_with_one_that_can(ranks):
    from tests.ranks import RankFailure

    with pytest.raises(RankFailure, match=r"kv_heads=6 cannot be split 4 ways over tp(.|\n)*tp=2 keeps the same 4"):
        ranks(4).run(two_steps, Layout(tp=4), {"mixer": GQA | {"heads": 12, "kv_heads": 6}})


def test_selective_recompute_of_compiled_blocks_is_refused():
    with pytest.raises(ForgeError, match="selective recompute cannot look into compiled blocks"):
        tiny(engine={"kind": "native", "compiled": True, "recompute": "selective"})
