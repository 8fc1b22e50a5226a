from __future__ import annotations

import subprocess
import sys

import pytest

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.plan import ranks

LARGEST = Layout(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=4, etp=2)


def axis(layout: Layout, name: str, per_node: int = 8) -> ranks.Axis:
    return next(each for each in ranks.axes(layout, per_node) if each.name == name)


def test_an_axis_has_the_group_of_rank_0_and_its_stride():
    found = axis(Layout(pp=2, dp_shard=4, tp=2), "dp_shard")
    assert (found.degree, found.first, found.stride) == (4, (0, 2, 4, 6), 2)


def test_axes_inside_a_node_and_across_nodes_are_told_apart():
    layout = Layout(pp=2, dp_shard=4, tp=2)
    assert [(each.name, each.nodes) for each in ranks.axes(layout, 8)] == [
        ("pp", (2, 2)),
        ("dp_shard", (1, 1)),
        ("tp", (1, 1)),
    ]


def test_groups_of_one_axis_may_touch_different_numbers_of_nodes():
    found = axis(Layout(dp_shard=4, tp=3), "tp", per_node=4)
    assert (found.nodes, found.place) == ((1, 2), "crosses: 1 to 2 nodes a group")


def test_the_order_of_ranks_decides_which_axis_crosses():
    inner, outer = Layout(dp_shard=8, tp=8), Layout(dp_shard=8, tp=8, order="tp-pp-rep-dp-cp")
    assert (axis(inner, "tp").crosses, axis(inner, "dp_shard").crosses) == (False, True)
    assert (axis(outer, "tp").crosses, axis(outer, "dp_shard").crosses) == (True, False)


def test_axes_of_experts_come_where_experts_are_split():
    layout = Layout(pp=16, dp_shard=128, ep=64)
    assert [each.name for each in ranks.axes(layout)] == ["pp", "dp_shard", "efsdp", "ep"]
    assert (axis(layout, "ep").nodes, axis(layout, "efsdp").first) == ((8, 8), (0, 64))


def test_groups_are_those_of_the_layout():
    for each in ranks.axes(LARGEST):
        assert each.first == LARGEST.ranks(each.name, 0)


def test_the_summary_fits_a_log():
    lines = ranks.summary(LARGEST, 8)
    assert len(lines) == 9 and max(len(line) for line in lines) <= 120
    assert lines[0] == "layout pp2-rep2-dp4-cp2-tp2-ep4-etp2: 64 ranks on 8 nodes of 8, order pp-rep-dp-cp-tp"
    assert lines[1] == "  pp 2: 0 32, crosses: 2 nodes a group"


def test_one_process_has_a_summary_too():
    assert ranks.summary(Layout()) == ["layout one: 1 rank on one node, order pp-rep-dp-cp-tp"]


def test_a_tensor_parallel_group_over_nodes_is_advised_against():
    assert ranks.table(Layout(tp=16), 8)[-1].startswith("tp sums in every layer and crosses nodes")
    assert "crosses" not in ranks.table(Layout(tp=8), 8)[-1]


def test_long_groups_are_abbreviated():
    assert ranks.shown(range(64)) == "0 1 2 ... 63"


def test_every_rank_is_drawn_in_its_node_with_its_place():
    lines = ranks.drawing(Layout(dp_shard=2, tp=2), 2)
    assert lines == [
        "node 0",
        "+------------+------------+",
        "|  0 dp0 tp0 |  1 dp0 tp1 |",
        "+------------+------------+",
        "node 1",
        "+------------+------------+",
        "|  2 dp1 tp0 |  3 dp1 tp1 |",
        "+------------+------------+",
    ]


def test_a_node_that_is_not_full_is_drawn():
    assert ranks.drawing(Layout(dp_shard=3), 2)[-2] == "|  2 dp2 |        |"


def test_the_drawing_fits_a_page():
    lines = ranks.drawing(LARGEST, 8)
    assert max(len(line) for line in lines) <= 120
    assert sum(line.count(" pp") for line in lines) == 64


def test_more_ranks_than_a_page_shows_are_not_drawn():
    assert ranks.drawing(Layout(dp_shard=65)) == []


def test_a_node_without_ranks_is_refused():
    with pytest.raises(LayoutError, match="a node has at least one rank, not 0"):
        ranks.axes(Layout(dp_shard=2), 0)


def test_the_summary_needs_no_torch():
    code = "import sys, shardforge.plan.ranks; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
