from __future__ import annotations

from itertools import combinations

import pytest

from shardforge.core.layout import SHORT, Layout
from shardforge.engine.kinds.native import NativeConfig
from shardforge.verify.cases import Case, covering, every, least, literals, micro_batches, pairs, sampled, used

ORDER = Layout().order
LARGE = ["dp512", "pp16-dp128-ep64", "pp4-rep2-dp8-cp2-tp8", "pp4-rep2-dp8-cp2-tp8-ep16-etp2", "tp16-dp2-ep32"]


@pytest.mark.parametrize("text", ["tp8", "pp2-dp2-tp2", "one"])
def test_a_layout_that_fits_stands_for_itself(text: str):
    plan = covering(Layout.parse(text), 8)
    assert [str(layout) for layout in plan.layouts] == [str(Layout.parse(text))] and not plan.unproved


@pytest.mark.parametrize("text", LARGE)
def test_smaller_layouts_fit_the_processes(text: str):
    assert all(1 < layout.world_size <= 8 for layout in covering(Layout.parse(text), 8).layouts)


@pytest.mark.parametrize("text", LARGE)
def test_smaller_layouts_combine_every_two_axes_of_the_large_one(text: str):
    whole = Layout.parse(text)
    shown = set().union(*(pairs(used(layout)) for layout in covering(whole, 8).layouts))
    assert shown == pairs(used(whole))


def test_sharded_experts_are_an_axis_of_their_own():
    assert [str(layout) for layout in covering(Layout.parse("pp16-dp128-ep64"), 8).layouts] == ["pp2-dp4-ep2"]


def test_degrees_and_products_that_stay_unproved_are_named_with_what_they_need():
    plan = covering(Layout.parse("pp4-rep2-dp2-cp2-tp8"), 8)
    assert "tp 8 is verified at 2" in plan.unproved
    assert plan.unproved[-1] == "pp x rep x dp x cp x tp together needs 32 processes"


def test_a_pair_that_does_not_fit_is_named():
    plan = covering(Layout.parse("pp2-dp2-tp2"), 3)
    assert "pp x tp needs 4 processes" in plan.unproved


def test_degrees_are_divisors_of_the_large_ones():
    assert [str(layout) for layout in covering(Layout.parse("dp9"), 8).layouts] == ["dp3"]


def test_least_is_the_smallest_world_with_all_axes():
    assert least(Layout.parse("dp8-tp4-ep8"), ("dp_shard", "ep")) == 2


@pytest.mark.parametrize("processes", [4, 8])
def test_all_layouts_combine_every_two_axes_that_fit(processes: int):
    layouts = every(tuple(SHORT), processes, ORDER)
    dense = [axis for axis in SHORT if axis not in ("ep", "etp")]
    shown = set().union(*(pairs(used(layout)) for layout in layouts))
    assert {frozenset(pair) for pair in combinations(dense, 2)} <= shown
    assert all(layout.world_size <= processes for layout in layouts)


def test_all_layouts_have_four_ranks_in_a_ring():
    assert {"cp4", "pp4"} <= {str(layout) for layout in every(tuple(SHORT), 4, ORDER)}


def test_axes_that_the_kinds_do_not_allow_do_not_come():
    assert {axis for layout in every(("dp_shard", "tp"), 8, ORDER) for axis in used(layout)} == {"dp_shard", "tp"}


def test_sampled_cases_show_every_value_of_every_option():
    shown = {
        option
        for case in sampled(every(tuple(SHORT), 8, ORDER), NativeConfig(), 16, lambda _: True)
        for option in case.options
    }
    engine = NativeConfig()
    names = ("schedule", "context", "dispatch", "overlap", "zero", "recompute")
    assert shown == {(name, value) for name in names for value in literals(engine, name)}


def test_options_come_only_where_their_axis_is():
    cases = sampled([Layout(dp_shard=2)], NativeConfig(), 8, lambda _: True)
    assert {name for case in cases for name, _ in case.options} == {"zero", "recompute"}


def test_a_case_that_is_not_allowed_is_replaced():
    cases = sampled([Layout(tp=2)], NativeConfig(), 8, lambda case: ("overlap", True) not in case.options)
    assert cases and all(("overlap", False) in case.options for case in cases)


def test_what_needs_a_gpu_is_not_sampled():
    assert "deepep" not in literals(NativeConfig(), "dispatch")


@pytest.mark.parametrize(
    ("layout", "wanted", "share", "pieces"), [("dp2", 8, 4, 2), ("pp2", 8, 8, 4), ("pp2", 3, 8, 2), ("dp2", 1, 4, 1)]
)
def test_micro_batches_are_as_many_as_wanted_within_the_small_batch(layout: str, wanted: int, share: int, pieces: int):
    assert micro_batches(Layout.parse(layout), wanted, share) == pieces


def test_a_case_prints_what_it_is():
    assert (
        str(Case(Layout(pp=2), (("schedule", "zbv"), ("overlap", True)), 4))
        == "pp2 schedule=zbv overlap=true 4 micro-batches"
    )
