from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

import tests.equivalence.cases  # noqa: F401 - one mesh a layout for the life of a pool
from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.parallel import fully_shard, mesh
from tests.tiny import tiny


def sharded() -> tuple[list[str], list[bool], dict[str, tuple[int, int]]]:
    """Names of the units, whether each frees its weights after forward, and numbers here and over all ranks."""
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    here = mesh.build(Layout(dp_shard=2), "cpu")
    fully_shard.apply(model, here, MixedPrecisionPolicy(), resharded=True)
    names = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    freed = [bool(unit._get_fsdp_state()._fsdp_param_group._reshard_after_forward) for unit in fully_shard.units(model)]
    sizes = {name: (weight._local_tensor.numel(), weight.numel()) for name, weight in model.named_parameters()}
    return names, freed, sizes


def test_the_units_are_the_blocks_and_the_rest(ranks):
    assert ranks(2).run(sharded)[0][0] == ["", "blocks.0", "blocks.1"]


def test_blocks_free_their_weights_after_forward_and_the_rest_keeps_them(ranks):
    assert ranks(2).run(sharded)[0][1] == [False, True, True]


def test_each_rank_holds_half_of_every_weight(ranks):
    for _, _, sizes in ranks(2).run(sharded):
        assert {name for name, (here, whole) in sizes.items() if 2 * here != whole} == set()
