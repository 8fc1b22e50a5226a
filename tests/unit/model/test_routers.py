from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shardforge.core import slots
from shardforge.core.errors import ForgeError
from shardforge.model.routers.topk import SCORES
from shardforge.model.routing import Routing
from shardforge.nn.dispatch import NOWHERE
from shardforge.nn.tokens import TokenSplit
from tests.tiny import tiny
from tests.tiny_kinds import MOE
from tests.tiny_routers import ALONE, NEEDS, B, E, H, K, S, plain, routed, router, sequence, spread, tokens

KINDS = slots.routers.kinds()
VARIANTS = [{"score": score, "weights": weights} for score in SCORES for weights in ("renormalized", "raw")]
VARIANTS += [{"order": "topk_first"}, {"groups": 4, "group_topk": 3}, {"bias": True}, {"selection_bias": None}]


@pytest.mark.parametrize("kind", KINDS)
def test_shares_add_up_to_one(kind):
    torch.testing.assert_close(routed(kind).shares.sum(-1), torch.ones(B, S, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_models_route_in_float32(kind):
    routing = routed(kind, dtype=torch.bfloat16)
    assert {routing.weight.dtype, routing.shares.dtype, routing.logits.dtype} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_says_whether_all_of_its_slots_name_an_expert(kind):
    made = router(kind, **NEEDS.get(kind, {}))
    assert made.dropless == bool((made(tokens(), sequence(), ALONE).expert != NOWHERE).all())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_the_router_are_among_those_that_learn_from_what_experts_return(kind):
    needs = NEEDS.get(kind, {})
    made = router(kind, **needs)
    weight = made(tokens(), sequence(step=0), ALONE).weight
    (weight * torch.arange(1.0, weight.shape[-1] + 1)).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in made.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_z_loss_sees_the_product_with_x_alone(kind):
    made = router(kind, **NEEDS.get(kind, {}))
    torch.testing.assert_close(made(tokens(), sequence(), ALONE).logits, tokens() @ made.weight.T)


def test_a_learned_bias_is_not_in_the_logits_of_the_z_loss():
    made = router(bias=True)
    made.bias.data += 3.0
    torch.testing.assert_close(made(tokens(), sequence(), ALONE).logits, tokens() @ made.weight.T)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_first_of_equal_experts_are_chosen(options):
    """An upcycled router begins with equal rows."""
    made = router(**options)
    made.weight.data[1:] = made.weight.data[:1]
    assert torch.equal(made(tokens(), sequence(), ALONE).expert, torch.arange(K).expand(B, S, K))


@pytest.mark.parametrize("score", SCORES)
def test_raw_weights_are_affinities_times_the_scale(score):
    routing = routed(score=score, weights="raw", scale=2.5)
    torch.testing.assert_close(routing.weight, 2.5 * SCORES[score](routing.logits).gather(-1, routing.expert))


@pytest.mark.parametrize("options", [{"score": score} for score in SCORES] + [{"order": "topk_first"}], ids=str)
def test_renormalized_weights_add_up_to_the_scale(options):
    weight = routed(scale=2.5, **options).weight
    torch.testing.assert_close(weight.sum(-1), torch.full((B, S), 2.5, dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES)
def test_without_bias_and_groups_the_largest_logits_are_chosen(score):
    routing = routed(score=score)
    assert torch.equal(routing.expert, routing.logits.argsort(-1, descending=True)[..., :K])


def test_softmax_before_and_after_the_choice_are_the_same_once_renormalized():
    before, after = routed(dtype=torch.float32), routed(order="topk_first", dtype=torch.float32)
    assert torch.equal(before.expert, after.expert)
    torch.testing.assert_close(before.weight, after.weight, rtol=0, atol=1e-6)


def test_softmax_without_renormalizing_is_smaller_by_the_share_of_the_chosen():
    """Even logits: k of e experts hold k/e of the weight."""
    routing = plain(weights="raw")(torch.zeros(B, S, E), sequence(), ALONE)
    torch.testing.assert_close(routing.weight.sum(-1), torch.full((B, S), K / E))


def test_sqrt_softplus_has_a_slope_where_softplus_is_zero():
    logits = torch.tensor([-300.0, -100.0, 0.0, 100.0], requires_grad=True)
    SCORES["sqrt_softplus"](logits).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("score", SCORES)
def test_affinities_that_are_all_zero_make_no_hole(score):
    routing = plain(score=score)(torch.full((B, S, E), -1e4), sequence(), ALONE)
    assert routing.weight.isfinite().all() and routing.shares.isfinite().all()


def test_one_expert_with_a_raw_weight_still_teaches_the_router():
    made = router("switch", k=1)
    made(tokens(), sequence(), ALONE).weight.sum().backward()
    assert made.weight.grad.abs().max() > 1e-3


def test_one_expert_with_a_renormalized_weight_teaches_the_router_nothing():
    made = router(k=1)
    made(tokens(), sequence(), ALONE).weight.sum().backward()
    assert made.weight.grad.abs().max() < 1e-12


def test_init_std_is_the_deviation_of_the_weights():
    assert abs(router(experts=64, hidden=512, init_std=0.02).weight.std().item() / 0.02 - 1) < 0.02


def test_switch_starts_small_and_cut_at_two_deviations():
    weight, deviation = router("switch", experts=64, k=1, hidden=512).weight, math.sqrt(0.1 / 512)
    cut = 2 * math.exp(-2) * 2 / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    assert weight.abs().max() <= 2 * deviation
    assert abs(weight.std().item() / (deviation * math.sqrt(1 - cut)) - 1) < 0.02


def jittered(part: int = 0, parts: int = 1, step: int | None = 0, columns: Tensor | None = None) -> Tensor:
    """Logits of ones, which are the random numbers themselves, of this part of the tokens."""
    whole = sequence(4, 8, step=step)
    if columns is not None:
        documents, positions = whole.documents[:, columns], whole.positions[:, columns]
        whole = replace(whole, documents=documents, positions=positions, index=columns, length=8)
    made = plain(jitter=0.1)
    count = (8 if columns is None else len(columns)) // parts
    return made(torch.ones(4, count, E, dtype=torch.float64), whole, TokenSplit(part, parts)).logits


def test_jitter_is_uniform_around_one():
    drawn = jittered()
    assert drawn.min() >= 0.9 and drawn.max() <= 1.1
    assert abs(drawn.mean().item() - 1) < 5 * 0.1 / math.sqrt(3 * drawn.numel())
    assert abs(drawn.std().item() - 0.1 / math.sqrt(3)) < 0.01


def test_jitter_is_for_training_alone():
    assert torch.equal(jittered(step=None), torch.ones(4, 8, E, dtype=torch.float64))


def test_jitter_changes_from_step_to_step():
    assert not torch.equal(jittered(step=0), jittered(step=1))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_the_tokens_have_the_jitter_of_the_whole(parts):
    assert torch.equal(torch.cat([jittered(part, parts) for part in range(parts)], 1), jittered())


def test_scattered_tokens_have_the_jitter_of_the_whole():
    columns = torch.tensor([0, 1, 6, 7])
    pieces = [jittered(part, 2, columns=columns) for part in range(2)]
    assert torch.equal(torch.cat(pieces, 1), jittered()[:, columns])


def test_layers_have_jitter_of_their_own():
    ones, first, second = torch.ones(B, S, E, dtype=torch.float64), plain(jitter=0.1), plain(jitter=0.1, layer=2)
    seq = sequence(step=0)
    assert not torch.equal(first(ones, seq, ALONE).logits, second(ones, seq, ALONE).logits)


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: router(groups=3, group_topk=1), "groups=3 does not divide experts=8"),
    (lambda: router(groups=4), "groups=4 and group_topk=None: one does nothing without the other"),
    (lambda: router(group_topk=4), "groups=None and group_topk=4: one does nothing without the other"),
    (lambda: router(groups=4, group_topk=5), "group_topk=5 of groups=4 cannot be kept"),
    (lambda: router(groups=4, group_topk=1), "k=3 of the 2 experts in group_topk=1 of groups=4 cannot be chosen"),
    (lambda: router(groups=4, group_topk=2), "group_topk=2 does not divide k=3"),
    (lambda: router(order="topk_first", score="sigmoid"), "score=sigmoid means nothing"),
    (lambda: router(order="topk_first", weights="raw"), "there are no raw ones"),
    (lambda: router("switch", k=2), "one expert, not to k=2"),
    (lambda: router("noisy_topk", k=E), "k=8 of experts=8 leaves none"),
]


@pytest.mark.parametrize(("make", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_cannot_be_is_refused_with_what_to_write(make, said):
    with pytest.raises(ForgeError) as caught:
        make()
    assert said in str(caught.value) and "fix:" in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ForgeError, match="3 problems"):
        router(order="topk_first", score="sigmoid", weights="raw", groups=3, group_topk=1)


@pytest.mark.parametrize("kept", [2, 3])
def test_the_fix_for_too_few_groups_is_one_that_holds(kept):
    with pytest.raises(ForgeError, match=f"group_topk: {kept}"):
        router(k=2 * kept, groups=4, group_topk=1)
    router(k=2 * kept, groups=4, group_topk=kept)


def test_max_needs_no_even_split_of_k_over_the_groups():
    assert routed(groups=4, group_topk=2, group_score="max").expert.shape == (B, S, K)


def test_routings_of_a_dry_run_have_the_shapes_of_a_run():
    made = router(groups=4, group_topk=3, score="sigmoid", jitter=0.1).to("meta")
    routing = made(torch.empty(B, S, H, device="meta", dtype=torch.float64), sequence(), ALONE)
    assert isinstance(routing, Routing) and spread(routing).shape == (B, S, E)


def test_a_recipe_is_refused_when_it_is_read_and_at_the_routers_place():
    with pytest.raises(ForgeError, match=r"blocks\.one\.ffn\.router: groups=3 does not divide experts=4"):
        tiny(ffn=MOE | {"router": {"kind": "topk", "groups": 3, "group_topk": 1}})
