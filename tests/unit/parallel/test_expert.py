from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn.dispatch import Local
from shardforge.nn.module import declared
from shardforge.parallel import expert, mesh
from tests.tiny import GLU, tiny
from tests.tiny_kinds import MOE


def built(layout: str, kind: expert.Kind = "auto", ranks_per_node: int | None = None, **options: object) -> nn.Module:
    recipe = tiny(layout=Layout.parse(layout), ffn=MOE | {"shared": GLU} | options, model={"stack": ["one"]})
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    expert.apply(model, mesh.build(recipe.parallel, "cpu"), kind, ranks_per_node)
    return model


def pieces(layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> this rank's shape, of the weights that are over a mesh."""
    found = built(layout).named_parameters()
    return {name: tuple(weight._local_tensor.shape) for name, weight in found if isinstance(weight, DTensor)}


def kinds(layout: str, kind: expert.Kind = "auto") -> list[str]:
    """The dispatch of a layer, from the outside in."""
    found, at = [], built(layout, kind).blocks["0"].ffn.dispatch
    while at is not None:
        found.append(type(at).__name__)
        at = getattr(at, "inner", getattr(at, "inside", None))
    return found


def parts(layout: str) -> tuple[int, int, int]:
    split = built(layout).blocks["0"].ffn.split
    return split.part, split.parts, 1 if split.group is None else split.group.size()


def adders(layout: str) -> float:
    """How often this rank adds the bias behind the split width."""
    return built(layout, bias=True).blocks["0"].ffn.experts.once


def hops(layout: str, ranks_per_node: int | None, on_a_machine: int | None) -> tuple[list[int], list[int]] | str:
    """Ranks across nodes and inside the node, or the refusal."""
    with patch.dict(os.environ, {} if on_a_machine is None else {"LOCAL_WORLD_SIZE": str(on_a_machine)}):
        try:
            two = built(layout, "two_hop", ranks_per_node).blocks["0"].ffn.dispatch
        except LayoutError as error:
            return str(error)
    two = getattr(two, "inner", two)
    return dist.get_process_group_ranks(two.across), dist.get_process_group_ranks(two.inside.group)


def refused(layout: str, options: dict[str, int]) -> str:
    try:
        built(layout, **options)
    except LayoutError as error:
        return str(error)
    return ""


def gradients_are_whole(layout: str) -> bool:
    """Whether no expert weight has a placement whose gradient would be a partial sum."""
    weights = [item.weight for item in declared(built(layout)) if item.dims[0].name == "expert"]
    return len(weights) == 3 and not any(place.is_replicate() for weight in weights for place in weight.placements)


@pytest.mark.parametrize(
    ("layout", "up", "down"),
    [
        ("dp2-ep2", (2, 16, 24), (2, 24, 16)),
        ("dp2-etp2", (4, 16, 12), (4, 12, 16)),
        ("dp4-ep2-etp2", (2, 16, 12), (2, 12, 16)),
        ("dp4-ep4", (1, 16, 24), (1, 24, 16)),
    ],
)
def test_experts_are_split_over_ep_and_each_of_them_over_etp(ranks, layout, up, down):
    expected = {f"blocks.0.ffn.experts.{name}": up for name in ("gate", "up")} | {"blocks.0.ffn.experts.down": down}
    assert ranks(Layout.parse(layout).world_size).run(pieces, layout)[-1] == expected


@pytest.mark.parametrize("layout", ["dp2-ep2", "dp2-etp2"])
def test_a_gradient_of_an_expert_is_whole_on_its_rank(ranks, layout):
    assert ranks(2).run(gradients_are_whole, layout) == [True, True]


def test_without_ep_and_etp_the_experts_stay_as_they_are(ranks):
    assert ranks(2).run(pieces, "tp2") == [{}, {}]
    assert ranks(2).run(kinds, "tp2")[0] == [Local.__name__]


@pytest.mark.parametrize(
    ("layout", "kind", "expected"),
    [
        ("dp2-ep2", "auto", ["Exchange"]),
        ("dp2-etp2", "auto", ["Gather"]),
        ("dp4-ep2-etp2", "auto", ["Widened", "Exchange"]),
        ("dp4-ep2-etp2", "gather", ["Gather"]),
        ("dp4-ep2-etp2", "two_hop", ["Widened", "TwoHop", "Exchange"]),
    ],
)
def test_tokens_travel_as_the_recipe_says(ranks, layout, kind, expected):
    assert ranks(Layout.parse(layout).world_size).run(kinds, layout, kind)[0] == expected


def test_each_rank_knows_its_tokens(ranks):
    assert ranks(4).run(parts, "cp2-tp2") == [(0, 2, 4), (1, 2, 4), (0, 2, 4), (1, 2, 4)]
    assert ranks(2).run(parts, "dp2-ep2") == [(0, 1, 1)] * 2


@pytest.mark.parametrize(
    ("layout", "ranks_per_node", "on_a_machine", "expected"),
    [
        ("dp4-ep4", 2, None, [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]),
        ("dp4-ep4", None, 2, [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]),
        ("dp4-ep4", None, None, [([rank], [0, 1, 2, 3]) for rank in range(4)]),
        ("dp4-ep2-etp2", None, 2, [([0, 2], [0]), ([1, 3], [1]), ([0, 2], [2]), ([1, 3], [3])]),
    ],
)
def test_hops_go_across_nodes_and_inside_them(ranks, layout, ranks_per_node, on_a_machine, expected):
    assert ranks(4).run(hops, layout, ranks_per_node, on_a_machine) == expected


@pytest.mark.parametrize(("ranks_per_node", "on_a_machine", "said"), [(3, None, "not 3"), (None, 3, "not 3")])
def test_uneven_nodes_are_refused(ranks, ranks_per_node, on_a_machine, said):
    for message in ranks(4).run(hops, "dp4-ep4", ranks_per_node, on_a_machine):
        assert "two_hop needs nodes with as many ranks each of ep=4" in message
    assert said in ranks(4).run(hops, "dp4-ep4", ranks_per_node, on_a_machine)[0]


@pytest.mark.parametrize(
    ("layout", "options", "what", "fix"),
    [
        ("dp4-ep4", {"experts": 6}, "expert=6 cannot be split 4 ways over ep", "ep must divide 6; ep=2"),
        ("dp4-etp4", {"inner": 22}, "expert_ffn=22 cannot be split 4 ways over etp", "etp must divide 22; etp=2"),
    ],
)
def test_experts_that_cannot_be_split_are_refused_with_a_degree_that_can(ranks, layout, options, what, fix):
    for message in ranks(4).run(refused, layout, options):
        assert what in message and fix in message


@pytest.mark.parametrize(("layout", "once"), [("dp2-etp2", [1.0, 0.0]), ("dp2-ep2", [1.0, 1.0])])
def test_a_bias_behind_a_split_width_is_added_on_one_rank(ranks, layout, once):
    assert ranks(2).run(adders, layout) == once
