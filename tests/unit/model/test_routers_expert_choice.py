from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.core.errors import ForgeError
from shardforge.model.build import build
from shardforge.model.flops import matmul_weights
from shardforge.model.routers.expert_choice import ExpertChoice, chosen
from shardforge.nn.batch import PADDING
from shardforge.nn.dispatch import NOWHERE
from shardforge.nn.init import fill
from shardforge.nn.tokens import TokenSplit
from tests.tiny import tiny
from tests.tiny_kinds import MOE
from tests.tiny_routers import ALONE, B, E, S, router, sequence, tokens

LENGTH = 16


def choosing(**options: Any) -> ExpertChoice:
    made = router("expert_choice", k=E, **{"leak": "allowed"} | options)
    assert isinstance(made, ExpertChoice)
    return made


def one_by_one(scores: Tensor, documents: Tensor, capacity: float) -> Tensor:
    """chosen, document by document and expert by expert; documents of a row have different numbers."""
    out = torch.zeros(scores.shape, dtype=torch.bool)
    for row, numbers in enumerate(documents.tolist()):
        for number in set(numbers) - {PADDING}:
            inside = [place for place, each in enumerate(numbers) if each == number]
            room = max(1, int(len(inside) * capacity / scores.shape[-1]))
            for expert in range(scores.shape[-1]):
                best = sorted(inside, key=lambda place: (-scores[row, place, expert].item(), place))
                out[row, best[:room], expert] = True
    return out


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([0.5, 1.0, 1.2, 2.0, 3.0]),
    st.sampled_from([2, 3, 6]),
    st.integers(1, 4),
)
def test_each_expert_takes_the_best_of_each_document(lengths, capacity, experts, values):
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).repeat(2, 1)
    documents[1] = documents[1].flip(0)
    documents[0, documents[0] == 1] = PADDING
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, values, (*documents.shape, experts), generator=generator).double()
    assert torch.equal(chosen(scores, documents, capacity), one_by_one(scores, documents, capacity))


@pytest.mark.parametrize("capacity", [1.0, 2.0, 4.0])
def test_all_experts_are_used_alike(capacity):
    expert = choosing(capacity=capacity)(tokens(B, LENGTH), sequence(B, LENGTH), ALONE).expert
    counts = (expert != NOWHERE).sum((0, 1))
    assert counts.tolist() == [int(B * LENGTH * capacity / E)] * E


def test_weights_are_shares_of_all_experts():
    routing = choosing()(tokens(), sequence(), ALONE)
    assert torch.equal(routing.weight, routing.logits.softmax(-1))
    assert all(set(routing.expert[..., expert].flatten().tolist()) <= {NOWHERE, expert} for expert in range(E))


def test_padding_is_taken_by_no_expert():
    expert = choosing(capacity=8.0)(tokens(), sequence(padded=2), ALONE).expert
    assert (expert[:, S - 2 :] == NOWHERE).all() and (expert[:, : S - 2] != NOWHERE).all()


def test_a_document_of_one_token_is_taken_by_every_expert():
    expert = choosing(capacity=0.5)(tokens(B, 1), sequence(B, 1), ALONE).expert
    assert (expert != NOWHERE).all()


def test_later_tokens_decide_about_earlier_ones():
    """Why a causal model refuses it: the future in another order, or another future, changes the past."""
    made, x, seq = choosing(), tokens(1, LENGTH), sequence(1, LENGTH)
    other = x.clone()
    other[:, 8:] *= 5.0
    before, after = (made(each, seq, ALONE).expert[:, :8] for each in (x, other))
    assert not torch.equal(before, after)


def test_a_causal_model_refuses_it_and_hears_why():
    with pytest.raises(ForgeError, match="lets a causal model see its future") as caught:
        router("expert_choice", k=E)
    assert "leak: allowed" in str(caught.value)


def test_everything_that_is_wrong_is_said_at_once():
    with pytest.raises(ForgeError, match="3 problems") as caught:
        router("expert_choice", k=2, capacity=9.0)
    assert f"k: {E}" in str(caught.value) and f"capacity: at most {E}" in str(caught.value)


def on_two_ranks(layout: str) -> Tensor:
    """What this rank's tokens of sequences are given, when another has the rest."""
    rank, x, seq = dist.get_rank(), tokens(B, LENGTH), sequence(B, LENGTH, padded=3)
    seq.documents[:, :5] = 7
    if layout == "tp2":
        return choosing()(x.chunk(2, 1)[rank], seq, TokenSplit(rank, 2, dist.group.WORLD)).expert
    index = torch.tensor([[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]][rank])
    here = {"documents": seq.documents[:, index], "positions": seq.positions[:, index]}
    seq = replace(seq, index=index, length=LENGTH, **here)
    return choosing()(x[:, index], seq, TokenSplit(0, 1, dist.group.WORLD)).expert


@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_ranks_that_share_sequences_choose_as_one_process(ranks, layout):
    seq = sequence(B, LENGTH, padded=3)
    seq.documents[:, :5] = 7
    whole = choosing()(tokens(B, LENGTH), seq, ALONE).expert
    order = torch.arange(LENGTH) if layout == "tp2" else torch.tensor([*range(4), *range(12, 16), *range(4, 12)])
    assert torch.equal(torch.cat(ranks(2).run(on_two_ranks, layout), 1), whole[:, order])


def test_the_work_of_a_mixture_is_that_of_the_average():
    """Its k is the number of experts, but its FLOP are those of `capacity` experts a token."""
    mixture = MOE | {"k": MOE["experts"], "router": {"kind": "expert_choice", "capacity": 2.0, "leak": "allowed"}}
    found, expected = (build(recipe.model, recipe.objective.build()) for recipe in (tiny(ffn=mixture), tiny(ffn=MOE)))
    assert matmul_weights(found) == matmul_weights(expected)


def test_a_mixture_is_the_sum_over_the_experts_that_took_a_token():
    mixture = MOE | {"k": MOE["experts"], "router": {"kind": "expert_choice", "leak": "allowed"}}
    recipe, x, seq = tiny(ffn=mixture), tokens(B, LENGTH), sequence(B, LENGTH, padded=3)
    module = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu").blocks["0"].ffn
    fill(module, 0)
    routing, expected = module.router(x, seq, ALONE), torch.zeros_like(x)
    for number in range(MOE["experts"]):
        experts = module.experts
        inner = torch.nn.functional.silu(x @ experts.gate[number]) * (x @ experts.up[number])
        taken = (routing.expert[..., number] != NOWHERE) * routing.weight[..., number]
        expected = expected + taken[..., None] * (inner @ experts.down[number])
    torch.testing.assert_close(module(x, seq), expected)
