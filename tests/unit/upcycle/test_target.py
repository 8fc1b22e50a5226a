from __future__ import annotations

import pytest

from shardforge.core.errors import Problems
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import plain
from shardforge.upcycle.options import read_options
from shardforge.upcycle.target import config, factors, target
from tests.tiny import mapping
from tests.unit.upcycle.dense import block

MLP = {"kind": "mlp", "inner": 24, "activation": "relu2"}


def model(**changes):
    return plain(from_mapping(mapping(**({"ffn": {"kind": "glu", "inner": 24}} | changes))).recipe.model)


def made(section=None, **flags):
    return target(section or model(), read_options(flags=flags), "source")


def refused(section=None, **flags):
    with pytest.raises(Problems) as found:
        made(section, **flags)
    return str(found.value)


def test_the_result_is_a_model_with_experts_of_the_dense_shape():
    found = made(experts=4, k=2)
    assert found.table["blocks.1.ffn.experts.gate"]["shape"] == [4, 16, 24]
    assert found.table["blocks.1.ffn.experts.down"]["shape"] == [4, 24, 16]
    assert found.table["blocks.1.ffn.router.weight"]["shape"] == [4, 16]
    assert found.model["stack"] == ["moe x 2"] and list(found.model["blocks"]) == ["moe"]


def test_other_layers_stay_dense():
    found = made(model(model={"stack": ["one x 5"]}), layers="every 2")
    assert found.model["stack"] == ["one", "moe", "one", "moe", "one"]
    assert [layer.number for layer in found.layers] == [1, 3]


def test_each_kind_of_block_gets_a_block_of_its_own():
    blocks = {"near": block(), "far": block(ffn={"kind": "glu", "inner": 32})}
    found = made(model(model={"blocks": blocks, "stack": ["near", "far", "near", "far"]}), layers="1-3")
    assert found.model["stack"] == ["near", "far_moe", "near_moe", "far_moe"]
    assert [layer.dense for layer in found.layers] == [32, 24, 32]


@pytest.mark.parametrize("gate, order, weights", [
    ("renormalized", "score_first", "renormalized"), ("raw", "score_first", "raw"),
    ("topk_first", "topk_first", "renormalized"),
])  # fmt: skip
def test_a_gate_is_a_router(gate, order, weights):
    ffn = config(made(gate=gate).model, "x").blocks["moe"].ffn
    assert (ffn.router.order, ffn.router.weights) == (order, weights)


def test_the_balance_loss_is_converted_to_one_at_balance():
    ffn = config(made(balance=0.02, k=2).model, "x").blocks["moe"].ffn
    assert [(each.scope, each.weight) for each in ffn.balance] == [("layers", 0.04)]


def test_no_balance_loss_is_none():
    assert config(made(balance=0.0).model, "x").blocks["moe"].ffn.balance == ()


def test_a_shared_expert_has_the_dense_form():
    ffn = config(made(model(ffn=MLP), shared=6).model, "x").blocks["moe"].ffn
    assert (ffn.shared.kind, ffn.shared.inner, ffn.shared.activation, ffn.form) == ("mlp", 6, "relu2", "mlp")


@pytest.mark.parametrize(
    "flags, degree, factor, bias",
    [
        ({"gate": "renormalized"}, 3, 1.0, 1.0),
        ({"gate": "raw", "experts": 8, "k": 2}, 3, 4 ** (1 / 3), 4.0),
        ({"gate": "raw", "experts": 8, "k": 4, "expert_ffn": 6}, 3, (2 * 16 / 4) ** (1 / 3), 2.0),
        ({"gate": "topk_first", "experts": 8, "k": 4, "expert_ffn": 6}, 2, 4 ** (1 / 2), 1.0),
    ],
)
def test_the_scale_is_the_published_one(flags, degree, factor, bias):
    """A = X G^2 / k for raw gates (X = E / G copies), G for gates that add up to 1; A^(1/degree) on each matrix."""
    options = read_options(flags={"scale": "virtual_group", **flags}).options
    assert factors(options, 24, options.expert_ffn or 24, degree) == pytest.approx((factor, bias))


@pytest.mark.parametrize("form, activation, degree", [("glu", "silu", 3), ("mlp", "relu2", 3), ("mlp", "gelu", 2)])
def test_a_matrix_gets_the_root_that_its_form_asks_for(form, activation, degree):
    section = model(ffn={"kind": form, "inner": 24, "activation": activation})
    layer = made(section, gate="raw", scale="virtual_group", experts=8, k=2).layers[0]
    assert layer.factor == pytest.approx(4 ** (1 / degree))


def test_only_virtual_groups_are_scaled_unasked():
    assert made(gate="raw").layers[0].factor == 1.0
    grouped = made(gate="raw", method="virtual_group", expert_ffn=12, experts=8, k=2)
    assert grouped.layers[0].factor == pytest.approx(8 ** (1 / 3))


def test_k_above_experts_is_refused_with_both_numbers():
    assert "k=5 of experts=4" in refused(experts=4, k=5)


def test_slices_that_do_not_divide_are_refused():
    told = refused(method="virtual_group", expert_ffn=10)
    assert "expert_ffn=10" in told and "24" in told and "8 for example" in told


def test_a_mixture_is_refused():
    told = refused(model(ffn={"kind": "moe", "experts": 4, "k": 2, "inner": 8}))
    assert "already" in told and "upcycle.layers" in told


def test_an_unknown_activation_is_refused():
    section = model()
    section["blocks"]["one"]["ffn"]["activation"] = "swish2"
    assert "swish2" in refused(section)


def test_a_wider_expert_and_a_wider_shared_one_are_refused_together():
    told = refused(expert_ffn=25, shared=30)
    assert "expert_ffn=25" in told and "shared=30" in told


def test_layers_beyond_the_model_are_refused():
    assert "layer 2 of a model whose layers are 0 to 1" in refused(layers="0-7")
