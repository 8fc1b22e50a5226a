from __future__ import annotations

import math

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
