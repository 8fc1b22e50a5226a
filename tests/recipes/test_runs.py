"""Runs of recipes/runs against the published tokens, rates and phases."""

from __future__ import annotations

import pytest

from shardforge.core.phases import value_at
from shardforge.data.sizes import BatchSizes
from shardforge.recipe.load import load
from shardforge.recipe.schema import Recipe

V3 = "deepseek-v3-pretrain"
TOKENS = {
    V3: 14.8e12,
    "deepseek-v2-lite-pretrain": 5.7e12,
    "llama3-405b-pretrain": 15.6e12,
    "olmo2-7b-pretrain": 3.895e12,
    "drop-upcycling-8x152m-pretrain": 500e9,
    "drop-upcycling-8x1.5b-pretrain": 500e9,
    "drop-upcycling-8x3.7b-pretrain": 500e9,
    "llm-jp-1.5b-pretrain": 1e12,
    "llm-jp-152m-pretrain": 988_240 * 512 * 4096,
    "llm-jp-3-1.8b-pretrain": 988_240 * 512 * 4096,
    "llm-jp-3-3.7b-pretrain": 494_120 * 1024 * 4096,
    "llm-jp-3-13b-pretrain": 494_120 * 1024 * 4096,
    "llm-jp-3-172b-pretrain": 292_812 * 1728 * 4096,
}
RATES = {  # peak and last
    V3: (2.2e-4, 7.3e-6),
    "deepseek-v2-lite-pretrain": (4.2e-4, 4.2e-4 * 0.316**2),
    "llama3-405b-pretrain": (8e-5, None),
    "olmo2-7b-pretrain": (3e-4, None),
    "drop-upcycling-8x152m-pretrain": (2e-4, 2e-5),
    "drop-upcycling-8x1.5b-pretrain": (2e-4, 2e-5),
    "drop-upcycling-8x3.7b-pretrain": (2e-4, 2e-5),
    "llm-jp-1.5b-pretrain": (3e-4, 3e-5),
    "llm-jp-152m-pretrain": (3e-4, 3e-5),
    "llm-jp-3-1.8b-pretrain": (3e-4, 3e-5),
    "llm-jp-3-3.7b-pretrain": (3e-4, 3e-5),
    "llm-jp-3-13b-pretrain": (2e-4, 2e-5),
    "llm-jp-3-172b-pretrain": (8e-5, 8e-6),
}


def run(name: str) -> Recipe:
    return load(name).recipe


def tokens(recipe: Recipe, step: int) -> int:
    return BatchSizes.of(recipe.train).before(step) * recipe.train.seq_len


def step_of(recipe: Recipe, count: float) -> int:
    """The first step before which `count` tokens were read."""
    low, high = 0, recipe.train.steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if tokens(recipe, middle) >= count else (middle + 1, high)
    return low


def rate(recipe: Recipe, count: float) -> float:
    return recipe.schedule.at(step_of(recipe, count), recipe.train.steps)


@pytest.mark.parametrize("name", TOKENS)
def test_a_run_reads_its_published_tokens(name: str):
    recipe = run(name)
    assert tokens(recipe, recipe.train.steps) == pytest.approx(TOKENS[name], rel=2e-4)


@pytest.mark.parametrize("name", RATES)
def test_rates_are_the_published_ones(name: str):
    recipe, (peak, last) = run(name), RATES[name]
    steps = recipe.train.steps
    assert recipe.schedule.at(recipe.schedule.warmup - 1, steps) == pytest.approx(peak)
    assert last is None or recipe.schedule.at(steps - 1, steps) == pytest.approx(last, rel=1e-3)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(9.99e12, 2.2e-4), (12.15e12, 1.21e-4), (14.301e12, 2.2e-5), (14.63e12, 2.2e-5), (14.64e12, 7.3e-6)],
)
def test_deepseek_v3_learns_by_its_phases_of_tokens(count: float, expected: float):
    assert rate(run(V3), count) == pytest.approx(expected, rel=1e-3)


def test_deepseek_v3_has_its_full_batch_after_469_billion_tokens():
    recipe = run(V3)
    sizes, step = BatchSizes.of(recipe.train), step_of(recipe, 469e9)
    assert sizes.at(0) == 3072 and sizes.at(step - 2) < 15_360 == sizes.at(step + 1)


@pytest.mark.parametrize(("count", "speed"), [(14.29e12, 1e-3), (14.31e12, 0.0)])
def test_the_selection_bias_of_deepseek_v3_rests_at_the_end(count: float, speed: float):
    recipe = run(V3)
    bias = recipe.model.blocks["moe"].ffn.router.selection_bias
    assert value_at(bias.rate, step_of(recipe, count) / recipe.train.steps) == speed


@pytest.mark.parametrize(("count", "weight"), [(9.99e12, 0.3), (10.01e12, 0.1)])
def test_the_second_token_of_deepseek_v3_weighs_less_from_10_trillion_tokens_on(count: float, weight: float):
    recipe = run(V3)
    assert value_at(recipe.model.mtp.weight, step_of(recipe, count) / recipe.train.steps) == weight


def test_a_layout_of_deepseek_v3_trains_it_as_published():
    laid, plain = run("deepseek-v3-2048"), run(V3)
    assert (laid.model, laid.schedule, laid.optim) == (plain.model, plain.schedule, plain.optim)
    assert laid.parallel.world_size == 2048


@pytest.mark.parametrize(("count", "expected"), [(1e12, 4.2e-4), (5e12, 1.3272e-4), (5.5e12, 4.194e-5)])
def test_deepseek_v2_lite_steps_down_twice(count: float, expected: float):
    assert rate(run("deepseek-v2-lite-pretrain"), count) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama3-405b-pretrain"])
def test_llama_3_ends_before_its_cosine(name: str):
    recipe = run(name)
    schedule, steps = recipe.schedule, recipe.train.steps
    assert schedule.horizon == 1_200_000 > steps
    assert schedule.at(steps - 1, steps) > 1.5 * schedule.lr * 0.01
    assert schedule.at(1_200_000, steps) == pytest.approx(schedule.lr * 0.01)


@pytest.mark.parametrize(("count", "batch"), [(2.8e12, 8 * 2**20), (2.9e12, 16 * 2**20)])
def test_llama_3_doubles_its_batch(count: float, batch: int):
    recipe = run("llama3-405b-pretrain")
    assert BatchSizes.of(recipe.train).at(step_of(recipe, count)) * recipe.train.seq_len == batch


def test_olmo_2_ends_before_its_cosine_of_5_trillion_tokens():
    recipe = run("olmo2-7b-pretrain")
    assert recipe.schedule.horizon * 1024 * 4096 == pytest.approx(5e12, rel=1e-5)


@pytest.mark.parametrize("size", ["8x152m", "8x1.5b", "8x3.7b"])
def test_drop_upcycling_balances_over_layers_with_a_coefficient_of_0_02_for_each_choice(size: str):
    (balance,) = run(f"drop-upcycling-{size}-pretrain").model.blocks["moe"].ffn.balance
    assert (balance.scope, balance.weight) == ("layers", 0.02 * 2)


@pytest.mark.parametrize(
    ("name", "scope", "weight"), [(V3, "sequence", 1e-4), ("deepseek-v2-lite-pretrain", "sequence", 1e-3)]
)
def test_deepseek_balances_each_sequence(name: str, scope: str, weight: float):
    (balance,) = run(name).model.blocks["moe"].ffn.balance
    assert (balance.scope, balance.weight, balance.sequences) == (scope, weight, 1)


@pytest.mark.parametrize("name", TOKENS)
def test_the_optimizer_is_the_published_adamw(name: str):
    optim = run(name).optim
    assert (optim.kind, optim.beta1, optim.beta2) == ("adamw", 0.9, 0.95)
    assert (optim.weight_decay, optim.clip, optim.eps) == (0.1, 1.0, 1e-8)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("olmo2-7b-pretrain", 1e-5), *((name, 1e-4) for name in TOKENS if name.startswith("llm-jp"))],
)
def test_the_z_loss_is_the_published_one(name: str, weight: float):
    assert run(name).objective.z_loss == weight
