from __future__ import annotations

import pytest
import torch

from shardforge.families import mixtures
from shardforge.families.statemap import StateMap
from shardforge.families.table import Row
from shardforge.families.trained import trained

SHAPES = {
    "blocks.0.ffn.router.weight": (4, 6),
    "blocks.0.ffn.experts.gate": (4, 6, 5),
    "blocks.0.ffn.experts.up": (4, 6, 5),
    "blocks.0.ffn.experts.down": (4, 5, 6),
}


@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_experts_are_stacked_with_the_gate_above(block):
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    table = StateMap(trained(mixtures.expert_rows(block, f"{block}.gate")), SHAPES)
    made = dict(table.to(weights.__getitem__))
    layer = "model.layers.0.mlp"
    assert made.keys() == {f"{layer}.gate.weight", f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj"}
    fused = made[f"{layer}.experts.gate_up_proj"]
    for expert in range(4):
        gate, up = weights["blocks.0.ffn.experts.gate"][expert], weights["blocks.0.ffn.experts.up"][expert]
        assert torch.equal(fused[expert], torch.cat([gate.T, up.T]))
        down = weights["blocks.0.ffn.experts.down"][expert]
        assert torch.equal(made[f"{layer}.experts.down_proj"][expert], down.T)


def test_there_and_back_is_the_same():
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    table = StateMap(trained(mixtures.expert_rows("mlp", "mlp.gate")), SHAPES)
    back = dict(table.back(dict(table.to(weights.__getitem__)).__getitem__))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_family_without_experts_one_by_one_has_the_names_of_its_files():
    table = (Row(("embed.{leaf}",), ("model.embed_tokens.{leaf}",)),)
    assert trained(table) == table
