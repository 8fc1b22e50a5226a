"""Law 4 for experts: where they are and how tokens reach them changes nothing, also where some get no token at all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.model.routers.topk import TopK
from shardforge.nn import dispatch
from shardforge.nn.tokens import TokenSplit
from tests.equivalence.cases import compiled_two_steps, two_steps
from tests.equivalence.traps import replaced
from tests.tiny import GLU, LENGTH, SEQUENCES, assert_same
from tests.tiny_kinds import EVEN, MOE, RAW, TIGHT

EXPERTS = 4
TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
CASES: dict[str, dict[str, Any]] = {
    "dropless": {"ffn": MOE | {"balance": EVEN, "z_loss": 0.1}},
    "limited": {"ffn": MOE | {"shared": GLU, "capacity": TIGHT, "balance": EVEN, "z_loss": 0.1}},
    "raw": {"ffn": MOE | {"router": RAW, "k": 1, "capacity": TIGHT | {"factor": 0.5}, "balance": EVEN}},
    "clamped": {
        "ffn": MOE
        | {
            "bias": True,
            "clamp": 0.5,
            "shared": GLU,
            "shared_gate": "sigmoid",
            "capacity": TIGHT | {"drop": "weight", "eval_factor": 2.0},
            "balance": [
                {"scope": "sequence", "weight": 0.1, "sequences": 2},
                {"scope": "batch", "weight": 0.2},
                {"scope": "layers", "weight": 0.3},
            ],
        }
    },
    "previous": {
        "ffn": MOE
        | {
            "form": "mlp",
            "bias": True,
            "balance": [
                {"scope": "batch", "weight": 0.2, "counts": "previous"},
                {"scope": "layers", "weight": 0.3, "counts": "previous"},
            ],
        }
    },
}
LAYOUTS = ["dp2-ep2", "tp2-ep2", "dp2-etp2", "dp4-ep4", "rep2-dp2-ep2", "dp2-tp2-ep2"]
LAYOUTS += ["cp2-tp2-ep4", "cp2-tp2-ep2-etp2"]
DISPATCHES = ["gather", "exchange", "two_hop"]
STEPS: dict[str, dict[str, Any]] = {
    "accumulated": {"train": TRAIN | {"micro_batch": 2}},
    "recompute-full": {"engine": {"recompute": "full"}},
    "recompute-selective": {"engine": {"recompute": "selective"}},
    "zero-1-accumulated": {"engine": {"zero": 1}, "train": TRAIN | {"micro_batch": 4}},
}


def skewed(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """two_steps with every token of the first layer sent to experts 1 and 2 in turn, so that 0 and 3 get none."""
    route = TopK.forward

    def turned(self: TopK, x: Tensor, seq: Any, split: TokenSplit) -> Any:
        routing = route(self, x, seq, split)
        expert = torch.tensor([1, 2]).expand_as(routing.expert)
        return replace(routing, expert=expert, weight=routing.shares.gather(-1, expert))

    with patch.object(TopK, "forward", turned):
        return two_steps(layout, changes)


def unrouted(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the chosen experts do not reach the router: right loss, wrong router."""

    def weighted_sum(y: Tensor, order: Tensor, weight: Tensor) -> Tensor:
        return right(y, order, weight.detach())

    right = dispatch.weighted_sum
    with replaced("weighted_sum", right, weighted_sum):
        return two_steps(layout, changes)


def counted_apart(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """Each rank balances its own part of a sequence."""
    with patch.object(TokenSplit, "total", lambda self, x: x):
        return two_steps(layout, changes)


@pytest.fixture(scope="module")
def alone(ranks):
    """(what runs, name) -> the two steps of one process, computed once."""
    return functools.cache(lambda name, run=two_steps: ranks(1).run(run, Layout(), CASES[name])[0])


def together(ranks, layout: str, changes: dict[str, Any], run: Callable = two_steps) -> dict[str, Tensor]:
    wanted = Layout.parse(layout)
    return ranks(wanted.world_size).run(run, wanted, changes)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_expert_layout_equals_one_process(ranks, alone, layout):
    assert_same(together(ranks, layout, CASES["limited"]), alone("limited"))


@pytest.mark.parametrize("layout", ["tp2-ep2", "dp4-ep4"])
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"limited"}))
def test_any_router_and_any_loss_equals_one_process(ranks, alone, case, layout):
    assert_same(together(ranks, layout, CASES[case]), alone(case))


@pytest.mark.parametrize("layout", ["pp2-dp2-ep2", "dp2-etp2"])
@pytest.mark.parametrize("case", ["clamped", "previous"])
def test_losses_over_all_layers_and_biases_equal_those_of_one_process(ranks, alone, case, layout):
    assert_same(together(ranks, layout, CASES[case] | STEPS["accumulated"]), alone(case))


@pytest.mark.parametrize("layout", ["tp2-ep2", "dp2-tp2-ep2-etp2"])
@pytest.mark.parametrize("kind", DISPATCHES)
def test_any_dispatch_equals_one_process(ranks, alone, kind, layout):
    assert_same(together(ranks, layout, CASES["limited"] | {"engine": {"dispatch": kind}}), alone("limited"))


@pytest.mark.parametrize("layout", ["dp2-ep2", "dp4-ep4"])
@pytest.mark.parametrize("kind", DISPATCHES)
def test_ranks_without_a_single_token_take_part(ranks, alone, kind, layout):
    got = together(ranks, layout, CASES["dropless"] | {"engine": {"dispatch": kind}}, skewed)
    assert_same(got, alone("dropless", skewed))


def test_an_expert_without_tokens_has_a_gradient_of_zeros(ranks):
    got = together(ranks, "dp4-ep4", CASES["dropless"], skewed)
    for name in ("gate", "up", "down"):
        assert [bool(each.any()) for each in got[f"0 grad blocks.0.ffn.experts.{name}"]] == [False, True, True, False]


@pytest.mark.parametrize(
    ("case", "layout"), [("limited", "dp2-ep2"), ("limited", "cp2-tp2-ep2-etp2"), ("clamped", "cp2-tp2-ep2-etp2")]
)
@pytest.mark.parametrize("step", STEPS)
def test_how_a_step_with_experts_is_computed_does_not_change_it(ranks, alone, case, step, layout):
    assert_same(together(ranks, layout, CASES[case] | STEPS[step]), alone(case))


@pytest.mark.parametrize(
    ("mistake", "layout", "wrong"),
    [(unrouted, "dp2-ep2", "router.weight"), (counted_apart, "tp2-ep2", "router.weight")],
)
def test_a_wrong_gradient_behind_a_right_loss_is_caught(ranks, alone, mistake, layout, wrong):
    """transformers#48687: the router's gradient under ep; Megatron-LM#1478, #1330: balance over parts of sequences."""
    got, expected = together(ranks, layout, CASES["dropless"], mistake), alone("dropless")
    assert torch.allclose(got["0 loss"][0], expected["0 loss"][0], rtol=1e-12)
    with pytest.raises(AssertionError, match=f"0 grad blocks.0.ffn.{wrong}"):
        assert_same(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind"), [("dp2-ep2", "exchange"), ("tp2-ep2", "gather")])
def test_compiled_experts_equal_eager_ones(ranks, alone, layout, kind):
    changes = CASES["limited"] | {"engine": {"compiled": True, "dispatch": kind}}
    got = together(ranks, layout, changes, compiled_two_steps)
    got.pop("graphs")
    assert_same(got, alone("limited"))
