"""Our mixtures choose the experts that those of the transformers library choose, and balance them by the same loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardforge.engine.base import Losses
from shardforge.model.decoder import Decoder
from shardforge.model.routing import Routing
from shardforge.nn.batch import PADDING, Batch
from shardforge.nn.tokens import TokenSplit
from tests.parity.compare import TOLERANCE, B, S, distance, inputs, pair, quiet, renamed, wrong_gradients
from tests.parity.models import Published
from tests.parity.models_moe import CHARGED, MIXTURES, charged, routed
from tests.tiny import tiny

pytest.importorskip("transformers", reason="the transformers package is the reference")

COEFFICIENT = 0.5  # large: the gradient of the auxiliary loss is of the size of the other one


def watched(routers: dict[int, nn.Module], run: Callable[[], Any]) -> dict[int, tuple[Tensor, Any]]:
    """What each router was given and what it returned, by layer."""
    seen: dict[int, tuple[Tensor, Any]] = {}
    hooks = [
        router.register_forward_hook(lambda _, given, out, layer=layer: seen.update({layer: (given[0], out)}))
        for layer, router in routers.items()
    ]
    with quiet(), torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def their_routers(model: nn.Module) -> dict[int, nn.Module]:
    names = {name: module for name, module in model.named_modules() if name.endswith((".mlp.gate", ".mlp.router"))}
    return {int(name.split(".")[2]): module for name, module in names.items()}


def our_routers(model: Decoder) -> dict[int, nn.Module]:
    return {block.layer: block.ffn.router for block in model.blocks.values() if hasattr(block.ffn, "router")}


def their_choice(router: nn.Module, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(experts, weights) [b, s, k], best expert first: where it wants no order, the library promises none."""
    logits, weight, expert = out
    bias = getattr(router, "e_score_correction_bias", None)
    worth = logits if bias is None else logits.sigmoid() + bias
    order = worth.gather(-1, expert).argsort(-1, descending=True)
    return expert.gather(-1, order).view(B, S, -1), weight.gather(-1, order).view(B, S, -1)


def assert_chosen(layer: int, routing: Routing, router: nn.Module, out: tuple[Tensor, Tensor, Tensor]) -> None:
    """Of every token the same experts in the same order, and each of them with the same weight."""
    expert, weight = their_choice(router, out)
    differing = (routing.expert != expert).any(-1).nonzero().tolist()
    assert not differing, f"layer {layer}: other experts, or in another order, at the tokens {differing}"
    assert distance(routing.weight, weight) < TOLERANCE, f"layer {layer}: other weights"


def assert_same_on_the_same_input(published: Published) -> None:
    theirs, ours = pair(published)
    tokens, _, seq = inputs()
    routers, mine = their_routers(theirs), our_routers(ours)
    seen = watched(routers, lambda: theirs(tokens))
    assert seen.keys() == mine.keys()
    for layer, (x, out) in seen.items():
        assert_chosen(layer, mine[layer](x.view(B, S, -1), seq, TokenSplit()), routers[layer], out)


@pytest.mark.parametrize("name", MIXTURES)
def test_on_the_same_input_a_router_chooses_the_experts_of_the_published_one(name):
    assert_same_on_the_same_input(MIXTURES[name]())


@pytest.mark.parametrize("order", ["score_first", "topk_first"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_a_softmax_before_the_choice_or_behind_it_gives_the_weights_of_the_published_one(name, order):
    published = MIXTURES[name]()
    assert_same_on_the_same_input(replace(published, model=routed(published.model, {"order": order})))


@pytest.mark.parametrize("name", MIXTURES)
def test_in_the_whole_model_every_token_goes_to_the_experts_of_the_published_one(name):
    theirs, ours = pair(MIXTURES[name]())
    tokens, _, seq = inputs()
    routers, mine = their_routers(theirs), our_routers(ours)
    expected = watched(routers, lambda: theirs(tokens))
    got = watched(mine, lambda: ours(tokens, seq))
    assert got.keys() == expected.keys()
    for layer, (_, out) in expected.items():
        assert_chosen(layer, got[layer][1], routers[layer], out)


def their_total(name: str, padded: int) -> tuple[nn.Module, float, float]:
    """The published model after the backward pass of its own total loss, which is the mean cross entropy and the
    auxiliary loss; and these two."""
    theirs, _ = pair(charged(name, COEFFICIENT))
    tokens, labels, seq = inputs(padded)
    mask = (seq.documents != PADDING).long()
    with quiet():
        out = theirs(tokens, attention_mask=mask, labels=labels, shift_labels=labels, output_router_logits=True)
    out.loss.backward()
    balance = COEFFICIENT * out.aux_loss.item()
    return theirs, out.loss.item() - balance, balance


def our_total(section: dict[str, Any], weights: dict[str, Tensor], batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
    """One step of the engine, a sequence at a time: its losses and every gradient."""
    train = {"steps": 1, "sequences": len(batch), "seq_len": batch.tokens.shape[1], "micro_batch": 1}
    recipe = tiny(model=section, train=train, precision={"master": "fp32", "compute": "fp32", "reduce": "fp32"})
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    with torch.no_grad():
        for key, value in engine.model.state_dict().items():
            (value.to_local() if isinstance(value, DTensor) else value).copy_(weights[key])
    engine.runner.renew()
    return engine.forward_backward(batch, 0), engine.gradients()


@pytest.mark.parametrize("padded", [0, 5])
@pytest.mark.parametrize("name", CHARGED)
def test_loss_auxiliary_loss_and_every_gradient_of_a_step_are_those_of_the_published_model(ranks, name, padded):
    published = charged(name, COEFFICIENT)
    theirs, cross_entropy, balance = their_total(name, padded)
    tokens, labels, seq = inputs(padded)
    batch = Batch(tokens, labels, seq.positions, seq.documents, seq.rows)
    weights = renamed(theirs.state_dict(), published)
    ((losses, grads),) = ranks(1).run(our_total, published.model, weights, batch)
    assert losses.loss == pytest.approx(cross_entropy, rel=TOLERANCE)
    assert losses.terms["balance"] == pytest.approx(balance, rel=TOLERANCE)
    assert not wrong_gradients(theirs, grads, published, least=1e-3)
