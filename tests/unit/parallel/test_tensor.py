from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from shardforge.core.dims import Dim
from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn.init import ones
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module, declared, tagged
from shardforge.parallel import mesh, tensor
from tests.tiny import GLU, GQA, VOCAB, tiny

TP2 = Layout(tp=2)
EVERYTHING = {
    "mixer": GQA | {"bias": "all", "qk_norm": "rmsnorm", "qk_norm_over": "all"},
    "ffn": GLU | {"bias": True},
    "model": {"embedding": {"kind": "learned", "length": 16}, "stack": ["one"]},
}
SPLIT = {
    "embed.weight": 0,
    "head.weight": 0,
    **{f"blocks.0.mixer.{name}.weight": 0 for name in "qkv"},
    **{f"blocks.0.mixer.{name}.bias": 0 for name in "qkv"},
    **{f"blocks.0.mixer.{name}_norm.weight": 0 for name in "qk"},
    "blocks.0.mixer.out.weight": 1,
    **{f"blocks.0.ffn.{name}.weight": 0 for name in ("gate", "up")},
    **{f"blocks.0.ffn.{name}.bias": 0 for name in ("gate", "up")},
    "blocks.0.ffn.down.weight": 1,
}
"""Name of a weight -> the dimension that tp splits; the others are whole on each rank."""


def built(layout: Layout, **changes: object) -> tuple[nn.Module, mesh.Mesh]:
    recipe = tiny(layout=layout, **changes)
    here = mesh.build(layout, "cpu")
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    tensor.apply(model, here)
    return model, here


def placements() -> dict[str, int | None]:
    model, _ = built(TP2, **EVERYTHING)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    where = {name: weight.placements[0] for name, weight in model.named_parameters()}
    return {name: getattr(place, "dim", None) for name, place in where.items()}


def told() -> dict[str, object]:
    """What the modules of this rank know of their part."""
    model, _ = built(TP2, **EVERYTHING)
    block = model.blocks["0"]
    return {
        "first row": model.embed.first,
        "positions once": model.embed.once,
        "bias of q": block.mixer.q.once,
        "bias of out": block.mixer.out.once,
        "bias of down": block.ffn.down.once,
        "columns": model.objective.split.first,
        "part": {(module.part, module.parts) for module in tagged(model, "dropout")},
        "sums statistics": (block.mixer.q_norm.total is not None, block.mixer_residual.norm.total is not None),
    }


def untouched() -> int:
    model, _ = built(Layout(dp_shard=2), **EVERYTHING)
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    return hooks + sum(isinstance(weight, DTensor) for weight in model.parameters())


def refused(kv_heads: int) -> str:
    try:
        built(TP2, mixer=GQA | {"heads": 6, "kv_heads": kv_heads})
    except LayoutError as error:
        return str(error)
    return ""


class Whole(Module):
    """A module that knows nothing of rows."""

    def __init__(self, *dims: Dim):
        super().__init__()
        self.declare("weight", *dims, init=ones)


def repeated(kv_heads: int) -> dict[str, object]:
    """What a rank holds and works with where it shares a head with others; the sum of one from each rank."""
    mixer = GQA | {"kv_heads": kv_heads, "bias": "qkv", "qk_norm": "rmsnorm", "qk_norm_over": "all"}
    block = built(Layout(tp=4), mixer=mixer)[0].blocks["0"].mixer
    one = torch.ones((), dtype=torch.float64)
    return {
        "whole": all(
            weight.placements[0].is_replicate() for part in (block.k, block.v) for weight in part.parameters()
        ),
        "rows": {(part.rows.start, part.rows.stop) for part in (block.k, block.v, block.k_norm)},
        "queries": (block.q.rows, block.q_norm.rows),
        "heads counted": block.k_norm.total(one).item(),
    }


def communicating() -> dict[str, bool]:
    """Name of each linear -> whether its matmul runs beside a collective; and the hooks that are left."""
    recipe = tiny(layout=TP2, model={"stack": ["one"]})
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    tensor.apply(model, mesh.build(TP2, "cpu"), overlap=True)
    parts = {name: part for name, part in model.named_modules() if isinstance(part, Linear)}
    after = sum(len(part._forward_hooks) for part in model.blocks.modules())
    return {name: part.product is not F.linear for name, part in parts.items()} | {"a second sum": after > 0}


def test_weights_are_split_where_the_names_of_their_dims_say(ranks):
    found = ranks(2).run(placements)
    assert found[0] == found[1]
    assert {name: dim for name, dim in found[0].items() if dim is not None} == SPLIT


def test_each_rank_knows_its_rows_and_the_first_one_adds_what_must_be_added_once(ranks):
    first, second = ranks(2).run(told)
    assert first == {
        "first row": 0,
        "positions once": 1.0,
        "bias of q": 1.0,
        "bias of out": 1.0,
        "bias of down": 1.0,
        "columns": 0,
        "part": {(0, 2)},
        "sums statistics": (True, False),
    }
    assert second == first | {
        "first row": VOCAB // 2,
        "positions once": 0.0,
        "bias of out": 0.0,
        "bias of down": 0.0,
        "columns": VOCAB // 2,
        "part": {(1, 2)},
    }


def test_without_tp_the_model_stays_as_it_is(ranks):
    assert ranks(2).run(untouched) == [0, 0]


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_that_can_be_split_or_shared_are_not_refused(ranks, kv_heads):
    assert ranks(2).run(refused, kv_heads) == ["", ""]


def test_heads_that_cannot_be_split_or_shared_are_refused_with_a_degree_that_can(ranks):
    (message, same) = ranks(2).run(refused, 3)
    assert message == same
    assert "kv_heads=3 cannot be split 2 ways over tp" in message and "tp=1 keeps the same 2 ranks" in message


def test_fewer_heads_than_ranks_that_do_not_divide_them_are_refused_with_both_numbers():
    with pytest.raises(LayoutError, match="kv_heads=2 cannot be split 3 ways over tp"):
        Layout(tp=3).split((Dim("kv_heads", 2, 4), Dim("hidden", 8)))


@pytest.mark.parametrize(("kv_heads", "first"), [(1, [0, 0, 0, 0]), (2, [0, 0, 4, 4])])
def test_ranks_that_share_a_head_hold_all_and_work_on_one(ranks, kv_heads, first):
    expected = {"whole": True, "queries": (None, None), "heads counted": kv_heads}
    assert ranks(4).run(repeated, kv_heads) == [expected | {"rows": {(row, row + 4)}} for row in first]


@pytest.mark.parametrize(("kv_heads", "tp"), [(1, 2), (1, 8), (2, 8), (4, 8), (3, 6)])
def test_a_rank_works_on_the_head_that_its_query_heads_read(kv_heads, tp):
    heads, width = 24, 5
    (item,) = declared(Linear(Dim("hidden", 8), Dim("kv_heads", kv_heads, width), ones))
    for part in range(tp):
        tensor.share(item, Layout(tp=tp), None, part)
        mine = range(part * heads // tp, (part + 1) * heads // tp)
        (read,) = {i * kv_heads // heads for i in mine}
        assert item.module.rows == slice(read * width, (read + 1) * width)


@pytest.mark.parametrize("dims", [(Dim("kv_heads", 2, 4),), (Dim("hidden", 8), Dim("kv_heads", 2, 4))])
def test_a_weight_that_cannot_be_read_in_part_is_refused_by_name(dims):
    (item,) = declared(Whole(*dims))
    with pytest.raises(LayoutError, match=r"weight \(.*kv_heads=2\*4\) has fewer heads than tp=4, and Whole reads it"):
        tensor.share(item, Layout(tp=4), None, 0)


def test_overlap_replaces_the_collectives_around_the_blocks_by_those_beside_the_matmuls(ranks):
    names = [f"blocks.0.mixer.{name}" for name in ("q", "k", "v", "out")]
    names += [f"blocks.0.ffn.{name}" for name in ("gate", "up", "down")]
    assert ranks(2).run(communicating) == [dict.fromkeys(names, True) | {"a second sum": False}] * 2
