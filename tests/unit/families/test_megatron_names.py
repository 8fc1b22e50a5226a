"""Every weight of a model has a place in Megatron, and comes back from it bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardforge.checkpoint.state import table as weights_of
from shardforge.families.megatron_names import Spot, common_name, spellings, spot, table
from shardforge.families.section import config
from shardforge.families.statemap import StateMap
from shardforge.model.build import build
from tests.unit.families.test_megatron_args import GQA, MOE, SECTIONS, SIGMOID, VOCAB, section

MIXED = MOE | {"router": SIGMOID, "balance": [{"scope": "batch", "weight": 0.1, "counts": "previous"}], "bias": True}
MORE = {
    "remembered": section(GQA, MIXED),
    "without gates": section(GQA, MOE | {"form": "mlp", "activation": "relu2"}),
    "further mixtures": section(GQA, MOE, mtp={"block": "one", "hidden": "after_norm"}),
}


def shapes(told):
    built = build(config(told, "test"), nn.Identity())
    return {name: tuple(each["shape"]) for name, each in weights_of(built).items()}


@pytest.mark.parametrize("padded", [VOCAB, VOCAB + 3])
@pytest.mark.parametrize("name", [*SECTIONS, *MORE])
def test_there_and_back_is_the_same(name, padded):
    told = (SECTIONS | MORE)[name]
    state = StateMap(table(told, padded), shapes(told))
    ours = {weight: torch.randn(shape) for weight, shape in shapes(told).items()}
    theirs = dict(state.to(ours.__getitem__))
    back = dict(state.back(theirs.__getitem__))
    assert state.unnamed == [] and back.keys() == ours.keys()
    assert all(torch.equal(back[weight], ours[weight]) for weight in ours)


@pytest.mark.parametrize("name", [*SECTIONS, *MORE])
def test_no_two_tensors_lie_in_one_place(name):
    told = (SECTIONS | MORE)[name]
    ours = {weight: torch.zeros(shape, device="meta") for weight, shape in shapes(told).items()}
    made = dict(StateMap(table(told, VOCAB), shapes(told)).to(ours.__getitem__))
    places = [spot(weight, 3, 4) for weight in made]
    assert len({(each.key, each.box(made[weight].shape)[0]) for weight, each in zip(made, places, strict=True)}) == len(
        made
    )


def test_layers_experts_and_halves_lie_in_one_tensor():
    found = spot("decoder.layers.2.mlp.experts.experts.1.linear_fc1.weight_v", 3, 4)
    assert found == Spot("decoder.layers.mlp.experts.experts.linear_fc1.weight", ((2, 3), (1, 4)), 1)
    assert found.box((20, 16)) == ((2, 1, 20, 0), (1, 1, 20, 16), (3, 4, 40, 16))


def test_layers_of_several_kinds_stay_apart():
    assert spot("decoder.layers.2.mlp.linear_fc1.weight_w", None, 4).key == "decoder.layers.2.mlp.linear_fc1.weight"


def test_a_norm_has_the_name_of_each_kind_of_layer():
    key = "decoder.layers.input_layernorm.weight"
    assert spellings(key) == (key, "decoder.layers.self_attention.linear_qkv.layer_norm_weight")


def test_every_spelling_is_one_name():
    key = "decoder.layers.3.self_attention.q_layernorm.weight"
    assert {common_name(each) for each in spellings(key)} == {key}
