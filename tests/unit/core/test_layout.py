from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.dims import Dim
from shardforge.core.errors import LayoutError
from shardforge.core.layout import RULES, Layout

DEGREES = st.integers(1, 4)
LAYOUTS = st.builds(Layout, dp_replicate=DEGREES, dp_shard=DEGREES, tp=DEGREES)
HIDDEN = Dim("hidden", 64)


@given(LAYOUTS)
def test_printed_layout_parses_back(layout: Layout):
    assert Layout.parse(str(layout)) == layout


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
    assert Layout(tp=2).split((HIDDEN, Dim(name, 8))) == {RULES[name]: 1}


def test_axis_of_degree_one_splits_nothing():
    assert Layout(dp_shard=4).split((Dim("heads", 7),)) == {}


def test_local_shape_splits_between_pieces():
    assert Layout(tp=4).local_shape((Dim("heads", 8, 16), HIDDEN)) == (32, 64)


def test_indivisible_dim_names_both_numbers_and_the_nearest_layout():
    with pytest.raises(LayoutError) as caught:
        Layout(dp_shard=2, tp=16).split((Dim("kv_heads", 8),))
    assert str(caught.value) == (
        "parallel.tp  kv_heads=8 cannot be split 16 ways over tp\n"
        "    fix: tp must divide 8; tp=8 keeps the same 32 ranks with dp_shard=4"
    )


@given(LAYOUTS, st.integers(1, 64))
def test_fitting_degree_divides_both_numbers_and_no_larger_one_does(layout: Layout, count: int):
    found = layout.fitting("tp", count)
    common = [n for n in range(1, layout.tp + 1) if count % n == 0 and layout.tp % n == 0]
    assert found == common[-1]
