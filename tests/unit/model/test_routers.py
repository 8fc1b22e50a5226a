from __future__ import annotations

from typing import Any

import pytest
import torch

from shardforge.core import slots
from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.model.routing import Routing
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.recipe.model import InitConfig

E, K, H = 8, 3, 16
SEQ = Sequence(*(torch.zeros(2, 5, dtype=torch.int64),) * 2, torch.arange(2))


def routed(kind: str, dtype: torch.dtype = torch.float64, k: int = K, **options: Any) -> Routing:
    ctx = BuildContext(Dim("hidden", H), Dim("vocab", 32), 2, InitConfig(std=1.0))
    router = slots.routers[kind](**options).build(ctx, E, k)
    fill(router, 0)
    generator = torch.Generator().manual_seed(0)
    return router.to(dtype)(torch.randn(2, 5, H, generator=generator, dtype=torch.float64).to(dtype), SEQ)


@pytest.mark.parametrize("kind", slots.routers.kinds())
def test_the_k_experts_of_a_token_are_those_with_the_largest_logits(kind):
    routing = routed(kind)
    largest = routing.logits.argsort(-1, descending=True)[..., :K]
    assert torch.equal(routing.expert.sort(-1).values, largest.sort(-1).values)


@pytest.mark.parametrize("kind", slots.routers.kinds())
def test_weights_are_in_the_order_of_their_experts(kind):
    routing = routed(kind)
    affinity = routing.shares.gather(-1, routing.expert)
    torch.testing.assert_close(routing.weight, affinity / affinity.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", slots.routers.kinds())
def test_weights_over_the_chosen_add_up_to_the_scale(kind):
    weight = routed(kind, over="chosen", scale=2.5).weight
    torch.testing.assert_close(weight.sum(-1), torch.full((2, 5), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", slots.routers.kinds())
def test_shares_add_up_to_one(kind):
    torch.testing.assert_close(routed(kind).shares.sum(-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", slots.routers.kinds())
def test_narrow_models_route_in_float32(kind):
    routing = routed(kind, torch.bfloat16)
    assert {routing.weight.dtype, routing.shares.dtype, routing.logits.dtype} == {torch.float32}


def test_weights_over_all_experts_are_the_softmax():
    routing = routed("topk", over="all")
    assert torch.equal(routing.weight, routing.logits.softmax(-1).gather(-1, routing.expert))


def test_the_softmax_of_the_chosen_logits_is_the_softmax_over_all_divided_by_its_sum():
    routing = routed("topk")
    torch.testing.assert_close(routing.weight, routing.logits.gather(-1, routing.expert).softmax(-1))


def test_raw_sigmoids_are_the_weights():
    routing = routed("sigmoid", over="none")
    assert torch.equal(routing.weight, routing.logits.sigmoid().gather(-1, routing.expert))


def test_one_expert_of_the_softmax_over_all_still_teaches_the_router():
    assert routed("topk", k=1, over="all").weight.requires_grad
