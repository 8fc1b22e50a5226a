from __future__ import annotations

import math

import pytest
import torch

from shardforge.core.dims import Dim
from shardforge.model.build import build
from shardforge.model.context import BuildContext
from shardforge.nn.init import fill
from shardforge.recipe.model import InitConfig
from tests.tiny import GQA, tiny

STD, LAYERS, INNER = 0.05, 8, Dim("ffn", 64)
WRITING = ("mixer.out.weight", "ffn.down.weight")
"""Matrices that write to the residual stream."""


def context(rule: str, table_std: float | None = None) -> BuildContext:
    init = InitConfig(std=STD, rule=rule, table_std=table_std)
    return BuildContext(Dim("hidden", 32), Dim("vocab", 100), LAYERS, init)


def spread(init) -> float:
    return init(1, torch.arange(100_000), torch.float64).std().item()


@pytest.mark.parametrize(
    ("rule", "inside", "writing"),
    [
        ("flat", STD, STD),
        ("depth_scaled", STD, STD / math.sqrt(2 * LAYERS)),
        ("fan_in", 1 / math.sqrt(INNER.size), 1 / math.sqrt(INNER.size)),
    ],
)
def test_a_rule_gives_matrices_their_standard_deviation(rule, inside, writing):
    ctx = context(rule)
    assert spread(ctx.into(INNER)) == pytest.approx(inside, rel=0.01)
    assert spread(ctx.out_of(INNER)) == pytest.approx(writing, rel=0.01)


@pytest.mark.parametrize(("given", "expected"), [(None, STD), (0.7, 0.7)])
def test_tables_start_at_their_own_standard_deviation_or_that_of_matrices(given, expected):
    assert spread(context("depth_scaled", given).table()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("ffn", ["glu", "mlp"])
def test_depth_scaling_reaches_the_matrices_that_write_to_the_stream_and_no_other(ffn):
    init = {"std": STD, "rule": "depth_scaled"}
    mixer = GQA | {"head_dim": 32}
    changes = {"hidden": 128, "stack": ["one x 2"], "init": init}
    recipe = tiny(model=changes, mixer=mixer, ffn={"kind": ffn, "inner": 128})
    model = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(model, 1)
    matrices = {name: weight.std().item() for name, weight in model.named_parameters() if weight.dim() == 2}
    scaled = {name for name, std in matrices.items() if abs(std / (STD / 2) - 1) < 0.05}
    flat = {name for name, std in matrices.items() if abs(std / STD - 1) < 0.05}
    assert scaled == {name for name in matrices if name.endswith(WRITING)}
    assert scaled | flat == set(matrices)


def test_a_layer_knows_its_own_number():
    assert context("flat").at(3).layer == 3
