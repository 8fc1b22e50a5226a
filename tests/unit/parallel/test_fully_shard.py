from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.engine.native import NativeEngine
from shardforge.model.build import build
from shardforge.nn import init
from shardforge.nn.module import Module, local
from shardforge.optim.clip import clip, global_norm
from shardforge.parallel import fully_shard, mesh
from tests.tiny import LENGTH, RTOL, SEQUENCES, assert_same, batch, part, tiny

BLOCKS = 2
UNITS = BLOCKS + 1  # the rest is one
GATHER, SUM, ALL_SUM = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"
LIMIT = 0.5


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op.overloadpacket.__name__] += op.namespace == "c10d"
        return op(*args, **(kwargs or {}))


def engine(layout: Layout, zero: int) -> NativeEngine:
    """One sequence a micro-batch."""
    train = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 1}
    recipe = tiny(layout=layout, train=train, engine={"kind": "native", "zero": zero})
    return recipe.engine.build(recipe, torch.device("cpu"))


def counted(layout: Layout, zero: int) -> tuple[int, int, int]:
    """Collectives of a second step: gathers, sums over shards, sums over replicas without those of reported numbers."""
    made = engine(layout, zero)
    mine = part(batch(), made.mesh.data_rank, layout.data_ranks)
    made.forward_backward(mine, 0)
    made.update(0.01)
    with Collectives() as step:
        made.forward_backward(mine, 1)
    with Collectives() as reported:
        made.evaluate(mine)
    return step.count[GATHER], step.count[SUM], step.count[ALL_SUM] - reported.count[ALL_SUM]


def kept(zero: int) -> dict[str, set[bool]]:
    """Whether weights of blocks are whole when the last micro-batch begins, after the step, after an evaluation."""
    made, found = engine(Layout(dp_shard=2), zero), {}

    def look(when: str) -> None:
        found[when] = {not isinstance(weight, DTensor) for weight in made.model.blocks.parameters()}

    made.model.embed.register_forward_pre_hook(lambda module, args: look("between"))
    mine = part(batch(), made.mesh.data_rank, 2)
    made.forward_backward(mine, 0)
    between = found["between"]
    look("stepped")
    made.evaluate(mine)
    look("evaluated")
    return found | {"between": between}


def sharded() -> tuple[list[str], dict[str, tuple[int, int]]]:
    """Names of the units, and numbers of each weight here and over all ranks."""
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    fully_shard.apply(model, mesh.build(Layout(dp_shard=2), "cpu"), MixedPrecisionPolicy(), zero=3)
    sizes = {name: (weight._local_tensor.numel(), weight.numel()) for name, weight in model.named_parameters()}
    return unit_names(model), sizes


def unit_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


class Experts(Module):
    slot = "experts"

    def __init__(self, count: int):
        super().__init__()
        for name in ("up", "down"):
            dims = Dim("expert", count), Dim("expert_ffn", 4), Dim("hidden", 6)
            self.declare(name, *dims, init=init.normal(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(local(weight).square().sum() for weight in (self.up, self.down))


class Block(Module):
    slot = "block"

    def __init__(self, count: int):
        super().__init__()
        self.declare("dense", Dim("hidden", 6), Dim("inner", 4), init=init.normal(0.5))
        self.experts = Experts(count)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) * local(self.dense).square().sum()


def alone(count: int) -> nn.Module:
    """Some modules of a model, as a pipeline stage has them."""
    model = nn.Sequential(Block(count)).double()
    init.fill(model, 1)
    return model


def mixed(layout: Layout, count: int) -> nn.Module:
    """The same with its experts over (ep, etp) and all weights sharded, each over its own mesh."""
    model, here = alone(count), mesh.build(layout, "cpu")
    experts = model[0].experts
    for name in ("up", "down"):
        whole = getattr(experts, name).detach()
        piece = distribute_tensor(whole, here.expert, [Shard(0), Shard(1)], src_data_rank=None)
        setattr(experts, name, nn.Parameter(piece))
    fully_shard.apply(model, here, MixedPrecisionPolicy(), zero=3)
    init.fill(model, 1)
    return model


def expert_pieces(layout: Layout, count: int) -> tuple[list[str], tuple[int, ...], dict[str, Tensor]]:
    """Names of the units, shape of a rank's piece of the experts, and the whole weights."""
    model = mixed(layout, count)
    piece = model[0].experts.up._local_tensor
    return unit_names(model), tuple(piece.shape), {n: w.full_tensor() for n, w in model.named_parameters()}


def expert_step(layout: Layout) -> dict[str, Any]:
    """Whole gradients when every rank has the loss (sum of squares of its experts) * (sum of dense squares), and norms
    before and after the clip."""
    model = mixed(layout, 4)
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    model(x).backward()
    weights = list(model.parameters())
    norm = global_norm(weights)
    whole = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    clip(weights, norm, LIMIT)
    return {"gradients": whole, "norm": norm.item(), "clipped": global_norm(weights).item()}


def test_the_units_are_the_blocks_and_the_rest(ranks):
    assert ranks(2).run(sharded)[0][0] == ["", "blocks.0", "blocks.1"]


def test_each_rank_holds_half_of_every_weight(ranks):
    for _, sizes in ranks(2).run(sharded):
        assert {name for name, (here, whole) in sizes.items() if 2 * here != whole} == set()


@pytest.mark.parametrize("layout", ["dp2", "rep2-dp2"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_level_needs_the_collectives_that_its_docstring_says(ranks, layout, zero):
    wanted = Layout.parse(layout)
    micro_batches = SEQUENCES // wanted.data_ranks
    gathers = micro_batches * (BLOCKS + UNITS) if zero == 3 else UNITS
    sums = UNITS if zero == 1 else micro_batches * UNITS
    over_replicas = UNITS if wanted.dp_replicate > 1 else 0
    assert ranks(wanted.world_size).run(counted, wanted, zero)[0] == (gathers, sums, over_replicas)


@pytest.mark.parametrize(("zero", "whole"), [(3, {False}), (2, {True}), (1, {True})])
def test_a_level_keeps_whole_weights_through_the_step_or_does_not(ranks, zero, whole):
    assert ranks(2).run(kept, zero)[0]["between"] == whole


@pytest.mark.parametrize("when", ["stepped", "evaluated"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_only_pieces_are_left_after_a_step_and_after_an_evaluation(ranks, zero, when):
    assert ranks(2).run(kept, zero)[0][when] == {False}


@pytest.mark.parametrize(
    ("layout", "count", "shape"),
    [
        ("dp4-ep2", 4, (1, 4, 6)),  # two experts here, one of them on each of two ranks
        ("dp4-ep4", 4, (1, 4, 6)),  # no other rank has this expert
        ("dp4-ep2", 2, (1, 2, 6)),  # one expert here, half of its channels on each of two ranks
        ("dp4-etp2", 5, (5, 1, 6)),  # half of the channels here, and of those half
        ("rep2-dp2-ep2", 4, (2, 4, 6)),
    ],
)
def test_experts_are_a_unit_over_the_ranks_that_hold_the_same_ones(ranks, layout, count, shape):
    names, piece, whole = ranks(4).run(expert_pieces, Layout.parse(layout), count)[0]
    assert names == ["", "0", "0.experts"]
    assert piece == shape
    assert_same(whole, dict(alone(count).named_parameters()), rtol=0.0)


@pytest.mark.parametrize("layout", ["dp4-ep2", "dp4-ep4", "dp4-ep2-etp2", "dp4-etp2", "rep2-dp2-ep2"])
def test_gradients_of_experts_are_summed_over_the_ranks_that_hold_them_and_no_others(ranks, layout):
    wanted = Layout.parse(layout)
    model = alone(4)
    model(torch.ones((), dtype=torch.float64)).backward()
    copies = wanted.dp_replicate * wanted.efsdp
    expected = {name: weight.grad * copies for name, weight in model.named_parameters()}
    for found in ranks(4).run(expert_step, wanted):
        assert_same(found["gradients"], expected)


@pytest.mark.parametrize("layout", ["dp4-ep2", "dp4-ep4", "dp4-ep2-etp2", "rep2-dp2-ep2"])
def test_the_clip_norm_counts_experts_and_dense_weights_once_each(ranks, layout):
    for found in ranks(4).run(expert_step, Layout.parse(layout)):
        whole = torch.stack([grad.norm() for grad in found["gradients"].values()]).norm().item()
        assert found["norm"] == pytest.approx(whole, rel=RTOL)
        assert found["clipped"] == pytest.approx(LIMIT, rel=1e-5)
