from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.parallel import mesh


def coordinates(layout: Layout) -> tuple[dict[str, int], int, int]:
    here = mesh.build(layout, "cpu")
    return {axis: here.coordinate(axis) for axis in layout.axes}, here.data_rank, here.fsdp.ndim


def members(layout: Layout) -> tuple[list[int], list[int]]:
    """Ranks of the data group and of the tp group of this rank."""
    here = mesh.build(layout, "cpu")
    return dist.get_process_group_ranks(here.data), dist.get_process_group_ranks(here.tp.get_group())


def agreeing(layout: Layout) -> bool:
    """Whether places in a mesh, which say what a rank holds, are places in its groups, which say what it receives."""
    here = mesh.build(layout, "cpu")
    meshes = [here.whole, here.fsdp, here.expert, here.expert_fsdp]
    groups = [[each.get_group(dim).rank() for dim in range(each.ndim)] for each in meshes]
    where = layout.coordinates(dist.get_rank()) | layout.expert_coordinates(dist.get_rank())
    asked = (*layout.axes, "ep", "etp")
    return groups == [list(each.get_coordinate()) for each in meshes] and all(
        here.coordinate(axis) == where[axis] for axis in asked
    )


def refused(layout: Layout) -> str:
    try:
        mesh.build(layout, "cpu")
    except LayoutError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("text", ["dp4", "tp4", "dp2-tp2", "rep2-dp2", "rep2-tp2"])
def test_ranks_stand_where_the_layout_says(ranks, text):
    layout = Layout.parse(text)
    assert [where for where, _, _ in ranks(4).run(coordinates, layout)] == [layout.coordinates(n) for n in range(4)]


@pytest.mark.parametrize("order", ["pp-rep-cp-dp-tp", "tp-rep-pp-cp-dp", "dp-tp-cp-rep-pp"])
@pytest.mark.parametrize("text", ["dp2-cp2", "dp2-tp2-ep4", "cp2-tp2-ep2", "rep2-dp2-ep2"])
def test_groups_and_meshes_agree_in_any_order_of_ranks(ranks, text, order):
    assert all(ranks(4).run(agreeing, replace(Layout.parse(text), order=order)))


@pytest.mark.parametrize(("text", "data"), [("dp4", [0, 1, 2, 3]), ("tp4", [0] * 4), ("rep2-tp2", [0, 0, 1, 1])])
def test_ranks_of_one_tp_group_read_the_same_sequences(ranks, text, data):
    assert [found for _, found, _ in ranks(4).run(coordinates, Layout.parse(text))] == data


def test_data_and_tp_groups_cross(ranks):
    found = ranks(4).run(members, Layout.parse("dp2-tp2"))
    assert found == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]


@pytest.mark.parametrize(("text", "dimensions"), [("dp4", 1), ("rep2-dp2", 2), ("rep2-tp2", 2)])
def test_replicas_make_the_sharding_mesh_two_dimensional(ranks, text, dimensions):
    assert ranks(4).run(coordinates, Layout.parse(text))[0][2] == dimensions


def test_a_job_of_another_size_is_refused_with_both_numbers(ranks):
    for message in ranks(2).run(refused, Layout(dp_shard=3)):
        assert "needs 3 ranks, this job has 2" in message
