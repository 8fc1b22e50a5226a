from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.dims import Dim
from shardforge.core.errors import LayoutError
from shardforge.core.layout import EXPERT_AXES, RULES, Layout

DEGREES = st.integers(1, 4)
SMALL = st.integers(1, 2)
ORDERS = st.permutations(["pp", "rep", "dp", "cp", "tp"]).map("-".join)
DENSE = st.builds(Layout, pp=SMALL, dp_replicate=SMALL, dp_shard=DEGREES, cp=SMALL, tp=DEGREES, order=ORDERS)
LAYOUTS = st.one_of(
    DENSE, st.builds(Layout, dp_shard=st.just(6), tp=SMALL, cp=SMALL, ep=st.sampled_from([1, 2, 3, 6]), order=ORDERS)
)
HIDDEN = Dim("hidden", 64)


@given(LAYOUTS)
def test_printed_layout_parses_back(layout: Layout):
    assert replace(Layout.parse(str(layout)), order=layout.order) == layout


def test_one_process_prints_as_one():
    assert str(Layout()) == "one"


@pytest.mark.parametrize("text", ["", "tp", "2", "tp2-", "zz4", "tp2,dp2", "tp2-tp4", "tp0"])
def test_unreadable_layout_is_refused(text: str):
    with pytest.raises(LayoutError, match="cannot read layout"):
        Layout.parse(text)


@given(LAYOUTS)
def test_world_size_is_the_number_of_coordinates(layout: Layout):
    places = {tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)}
    assert places == set(product(*(range(degree) for degree in layout.shape)))


def test_tp_is_innermost_and_replicas_are_outermost():
    layout = Layout(dp_replicate=2, dp_shard=2, tp=2)
    assert [layout.coordinates(rank)["tp"] for rank in range(8)] == [0, 1] * 4
    assert [layout.coordinates(rank)["dp_replicate"] for rank in range(8)] == [0] * 4 + [1] * 4


@given(LAYOUTS, st.data())
def test_group_is_every_rank_that_differs_on_its_axis_only(layout: Layout, data: st.DataObject):
    axis = data.draw(st.sampled_from(layout.axes))
    rank = data.draw(st.integers(0, layout.world_size - 1))

    def others(of: int) -> dict[str, int]:
        return {name: place for name, place in layout.coordinates(of).items() if name != axis}

    assert layout.ranks(axis, rank) == tuple(r for r in range(layout.world_size) if others(r) == others(rank))


@given(LAYOUTS)
def test_groups_of_an_axis_cover_each_rank_once(layout: Layout):
    for axis in layout.axes:
        groups = {layout.ranks(axis, rank) for rank in range(layout.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


def test_data_ranks_leave_tp_out():
    assert Layout(dp_replicate=2, dp_shard=3, tp=4).data_ranks == 6


@pytest.mark.parametrize("name", RULES)
def test_named_dims_are_split_over_their_axis(name: str):
    axis = RULES[name]
    assert Layout(**{"dp_shard": 2, axis: 2}).split((HIDDEN, Dim(name, 8))) == {axis: 1}


def test_axis_of_degree_one_splits_nothing():
    assert Layout(dp_shard=4).split((Dim("heads", 7),)) == {}


def test_local_shape_splits_between_pieces():
    assert Layout(tp=4).local_shape((Dim("heads", 8, 16), HIDDEN)) == (32, 64)


def test_indivisible_dim_names_both_numbers_and_the_nearest_layout():
    with pytest.raises(LayoutError) as caught:
        Layout(dp_shard=2, tp=16).split((Dim("heads", 8),))
    assert str(caught.value) == (
        "parallel.tp  heads=8 cannot be split 16 ways over tp\n"
        "    fix: tp must divide 8; tp=8 keeps the same 32 ranks with dp_shard=4"
    )


@given(LAYOUTS, st.integers(1, 64))
def test_fitting_degree_divides_both_numbers_and_no_larger_one_does(layout: Layout, count: int):
    found = layout.fitting("tp", count)
    common = [n for n in range(1, layout.tp + 1) if count % n == 0 and layout.tp % n == 0]
    assert found == common[-1]


@given(LAYOUTS)
def test_ranks_of_an_expert_axis_cover_each_rank_once(layout: Layout):
    for axis in EXPERT_AXES:
        groups = {layout.ranks(axis, rank) for rank in range(layout.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))


@given(LAYOUTS)
def test_places_within_a_stage_and_a_replica_ascend_with_the_rank(layout: Layout):
    """torch sorts the ranks of a group, so a mesh in another order would send weights to the wrong ranks."""
    inside = layout.world_size // layout.pp // layout.dp_replicate
    placed = layout.placed()
    for start in range(0, layout.world_size, inside):
        assert list(placed[start : start + inside]) == sorted(placed[start : start + inside])
        where = [layout.expert_coordinates(rank) for rank in placed[start : start + inside]]
        assert where == sorted(where, key=lambda here: (here["efsdp"], here["ep"], here["etp"]))


@given(LAYOUTS)
def test_experts_stay_within_a_stage_and_a_replica(layout: Layout):
    for rank in range(layout.world_size):
        dense, sparse = layout.coordinates(rank), layout.expert_coordinates(rank)
        assert all(dense[axis] == sparse[axis] for axis in ("pp", "dp_replicate"))


def test_the_order_says_which_axis_has_neighbouring_ranks():
    layout = Layout(dp_shard=2, tp=4, order="pp-rep-tp-cp-dp")
    assert layout.ranks("dp_shard", of=0) == (0, 1)
    assert layout.ranks("tp", of=0) == (0, 2, 4, 6)


@pytest.mark.parametrize("order", ["", "tp-dp", "pp-rep-dp-cp-tp-ep", "pp rep dp cp tp"])
def test_an_order_that_is_not_all_axes_is_refused(order: str):
    with pytest.raises(LayoutError, match="write all of pp-rep-dp-cp-tp"):
        Layout(order=order)


def test_experts_must_fit_the_ranks_of_a_stage():
    with pytest.raises(LayoutError, match=r"ep=3 x etp=1 must divide the 4 ranks(.|\n)*ep=2 works"):
        Layout(dp_shard=4, ep=3)


def test_fewer_kv_heads_than_ranks_stay_whole_where_they_divide():
    assert Layout(tp=4).split((Dim("kv_heads", 2),)) == {}
    with pytest.raises(LayoutError, match="kv_heads=3 cannot be split 4 ways"):
        Layout(tp=4).split((Dim("kv_heads", 3),))
