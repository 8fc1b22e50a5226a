from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shardforge.model.build import build
from tests.tiny import tiny


def stepped(**options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    recipe = tiny(optim={"kind": "adamw"} | options)
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.full_like(weight, 2.0)
    optimizer = recipe.optim.build(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    return model, optimizer


def test_the_first_step_is_that_of_the_paper():
    """Algorithm 2: both means are corrected to the gradient, so the step is lr * g / (|g| + eps) and the decay."""
    model, _ = stepped(weight_decay=0.5, eps=0.25)
    expected = 1 - 0.1 * 0.5 - 0.1 * 2 / (2 + 0.25)
    assert {round(weight, 12) for weight in model.head.weight.flatten().tolist()} == {round(expected, 12)}


def test_the_decays_are_those_of_the_recipe():
    _, optimizer = stepped(beta1=0.8, beta2=0.6)
    state = next(iter(optimizer.state.values()))
    assert math.isclose(state["exp_avg"].flatten()[0].item(), 0.2 * 2.0)
    assert math.isclose(state["exp_avg_sq"].flatten()[0].item(), 0.4 * 4.0)


def test_nothing_moves_before_a_rate_is_given():
    recipe = tiny()
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    assert {group["lr"] for group in recipe.optim.build(model).param_groups} == {0.0}


def types(dtype: torch.dtype, states: str) -> tuple[str, set[torch.dtype]]:
    recipe = tiny(optim={"kind": "adamw", "states": states})
    model = build(recipe.model, recipe.objective.build(), dtype).to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.ones_like(weight)
    optimizer = recipe.optim.build(model)
    optimizer.step()
    kept = {optimizer.state[weight][name].dtype for weight in model.parameters() for name in ("exp_avg", "exp_avg_sq")}
    return type(optimizer).__name__, kept


@pytest.mark.parametrize(
    ("dtype", "states", "expected"),
    [
        (torch.float32, "master", ("AdamW", {torch.float32})),
        (torch.float32, "fp32", ("AdamW", {torch.float32})),
        (torch.float32, "bf16", ("NarrowAdamW", {torch.bfloat16})),
        (torch.float64, "master", ("AdamW", {torch.float64})),
        (torch.float64, "fp32", ("NarrowAdamW", {torch.float32})),
    ],
)
def test_moments_rest_in_the_type_of_the_recipe_and_only_narrow_ones_leave_the_fused_step(dtype, states, expected):
    assert types(dtype, states) == expected


def test_every_weight_is_known_by_its_name_in_the_whole_model():
    recipe = tiny(optim={"kind": "adamw", "states": "bf16"})
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    assert set(recipe.optim.build(model).names.values()) == {name for name, _ in model.named_parameters()}
