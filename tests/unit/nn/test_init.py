from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.nn import init
from shardforge.nn.module import Init, Module
from shardforge.parallel import fully_shard, mesh, tensor

LAYOUTS = ["one", "dp2", "dp4", "tp2", "tp4", "dp2-tp2", "rep2-dp2", "rep2-tp2"]
HEADS, WIDTH = Dim("heads", 4) * Dim("head_dim", 3), Dim("hidden", 6)
SHAPES: dict[str, tuple[Dim, ...]] = {
    "rows": (HEADS, WIDTH),  # over tp and over dp: a strided shard
    "columns": (WIDTH, HEADS),
    "uneven": (Dim("rows", 10), Dim("columns", 3)),
    "short": (Dim("rows", 3),),  # fewer rows than ranks
    "stack": (Dim("expert", 5), Dim("ffn", 8), WIDTH),
}


class Weights(Module):
    """One weight of each shape. `drawn` counts the numbers that each one's init was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = dict.fromkeys(SHAPES, 0)
        for name, dims in SHAPES.items():
            self.declare(name, *dims, init=self.counting(name))

    def counting(self, name: str) -> Init:
        def draw(key: int, index: Tensor, dtype: torch.dtype) -> Tensor:
            self.drawn[name] += index.numel()
            return init.normal(0.5)(key, index, dtype)

        return draw


def alone(seed: int = 1) -> dict[str, Tensor]:
    model = Weights()
    init.fill(model, seed)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def on_ranks(layout: Layout) -> tuple[dict[str, Tensor], dict[str, tuple[int, int, int]]]:
    """The whole weights, and (numbers drawn, numbers held, numbers of the largest piece) of each on this rank."""
    here = mesh.build(layout, "cpu")
    model = Weights()
    if layout.tp > 1:
        tensor.place(model, here)
    if layout.world_size > 1:
        fully_shard.apply(nn.Sequential(model), here, MixedPrecisionPolicy(), zero=3)
    init.fill(model, 1)
    whole, counts = {}, {}
    for name, weight in model.named_parameters():
        piece = weight._local_tensor if isinstance(weight, DTensor) else weight
        whole[name] = (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()
        counts[name] = (model.drawn[name], piece.numel(), whole[name].numel())
    return whole, counts


@pytest.fixture(scope="module")
def answers(ranks) -> Callable[[str], list]:
    found: dict[str, list] = {}

    def of(text: str) -> list:
        layout = Layout.parse(text)
        if text not in found:
            found[text] = ranks(layout.world_size).run(on_ranks, layout)
        return found[text]

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_starts_from_the_weights_of_one_process(answers, layout):
    expected = alone()
    for whole, _ in answers(layout):
        assert {name for name in expected if not torch.equal(whole[name], expected[name])} == set()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_draws_what_it_holds_and_no_more(answers, layout):
    for _, counts in answers(layout):
        assert {name: drawn for name, (drawn, _, _) in counts.items()} == {
            name: held for name, (_, held, _) in counts.items()
        }


@pytest.mark.parametrize(("layout", "parts"), [("dp4", 4), ("tp4", 4), ("dp2-tp2", 4), ("rep2-dp2", 2)])
def test_the_ranks_of_a_layout_hold_a_split_weight_once(answers, layout, parts):
    held = sum(counts["rows"][1] for _, counts in answers(layout))
    assert held == HEADS.size * WIDTH.size * 4 // parts


def test_the_seed_changes_every_weight():
    first, second = alone(1), alone(2)
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_weights_of_one_shape_start_differently():
    model = nn.ModuleDict({"a": Weights(), "b": Weights()})
    init.fill(model, 1)
    assert not torch.equal(model["a"].rows, model["b"].rows)


@pytest.mark.parametrize("chunk", [1, 7, 36])
def test_drawing_in_pieces_changes_nothing(monkeypatch, chunk):
    expected = alone()
    monkeypatch.setattr(init, "CHUNK", chunk)
    assert all(torch.equal(weight, expected[name]) for name, weight in alone().items())


def test_constants_are_constant():
    drawn = init.constant(0.25)(1, torch.arange(5), torch.float64)
    assert drawn.tolist() == [0.25] * 5 and drawn.dtype == torch.float64


def test_normal_has_the_standard_deviation_asked_for():
    assert abs(init.normal(0.02)(1, torch.arange(100_000), torch.float64).std() / 0.02 - 1) < 0.01


def test_truncated_normal_numbers_stay_within_two_deviations():
    drawn = init.truncated_normal(0.5)(3, torch.arange(100_000), torch.float64)
    assert drawn.abs().max() <= 1.0 and abs(drawn.mean().item()) < 0.01
    assert abs(drawn.std().item() / 0.5 - 0.8796) < 0.01  # that of a standard normal cut at 2
