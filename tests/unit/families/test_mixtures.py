from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardforge.families import mixtures
from shardforge.families.forms import EXPERTS
from shardforge.families.settings import Settings

TOLD = {"num_experts_per_tok": 2, "hidden_act": "silu"}


def of(**told: Any) -> Settings:
    return Settings(TOLD | told, Path("config.json"))


def moe(**told: Any) -> dict[str, Any]:
    return mixtures.moe(of(**told), 4, 8, weights="raw", coefficient=0.5)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_experts_are_counted_under_either_name(name):
    assert mixtures.count(of(**{name: 7})) == 7


def test_a_loss_that_transformers_does_not_take_is_none():
    assert moe(router_aux_loss_coef=0.25)["balance"] == []


@pytest.mark.parametrize(("told", "lines"), [({}, 0), ({"output_router_logits": True}, 0), ({"k": 1}, 1)])
def test_a_coefficient_that_does_not_count_is_told(told, lines):
    settings = of(**({"router_aux_loss_coef": 0.25} if told else {}), **told)
    mixtures.moe(settings, 4, 8, weights="raw", coefficient=0.5)
    assert len([line for line in settings.notes if line.startswith("router_aux_loss_coef=0.25: ")]) == lines


@pytest.mark.parametrize(("told", "weight"), [({"router_aux_loss_coef": 0.25}, 0.5), ({}, 1.0)])
def test_a_loss_that_transformers_takes_is_as_large_at_balance(told, weight):
    (loss,) = moe(output_router_logits=True, **told)["balance"]
    assert (loss["scope"], loss["weight"]) == ("layers", weight)  # k times the coefficient, where use is even


def test_a_loss_that_is_written_is_read_as_it_was():
    ffn = moe(output_router_logits=True, router_aux_loss_coef=0.25)
    assert moe(**mixtures.moe_config(ffn)) == ffn


def test_without_a_loss_the_coefficient_is_the_architecture_s():
    assert "router_aux_loss_coef" not in mixtures.moe_config(moe())


def test_each_stack_of_ours_is_a_tensor_an_expert_of_theirs():
    router, gate, *_ = mixtures.expert_rows("mlp", "mlp.gate", {"gate": "w1"})
    assert router.theirs == ("model.layers.{layer}.mlp.gate.{leaf}",)
    assert (gate.theirs, gate.form, gate.each) == (
        ("model.layers.{layer}.mlp.experts.{expert}.w1.weight",),
        EXPERTS,
        "expert",
    )
