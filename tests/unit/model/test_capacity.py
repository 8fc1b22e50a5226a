from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.model.capacity import Capacity
from shardforge.nn.dispatch import NOWHERE

E, K = 4, 2


def room(factor: float, **options: Any) -> Capacity:
    return Capacity(factor=factor, **{"min": 0, "rounding": "ceil"} | options)


def chosen(b: int, s: int, seed: int = 0) -> Tensor:
    """[b, s, K] different experts of each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, s, E, generator=generator).argsort(-1)[..., :K]


def weights(b: int, s: int) -> Tensor:
    """Few different ones, so that some are equal."""
    return torch.randint(1, 5, (b, s, K), generator=torch.Generator().manual_seed(2)) / 8


def kept(capacity: Capacity, expert: Tensor, documents: Tensor, training: bool = True) -> Tensor:
    return capacity.kept(expert, weights(*documents.shape), documents, E, training=training)


def one_by_one(capacity: Capacity, expert: Tensor, documents: Tensor) -> Tensor:
    """kept, by counting."""
    out, weight = torch.zeros_like(expert, dtype=torch.bool), weights(*documents.shape)
    for row, numbers in enumerate(documents.tolist()):
        for document in set(numbers):
            count = numbers.count(document)
            share = count * K * capacity.factor / E
            size = max(capacity.min, math.floor(share) if capacity.rounding == "floor" else math.ceil(share))
            for each in range(E):
                picked = [
                    (-weight[row, t, j].item() if capacity.drop == "weight" else 0.0, t, j)
                    for t in range(len(numbers))
                    for j in range(K)
                    if numbers[t] == document and expert[row, t, j] == each
                ]
                for _, t, j in sorted(picked)[:size]:
                    out[row, t, j] = True
    return out


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("drop", ["position", "weight"])
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    factor=st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0]),
    least=st.integers(0, 3),
)
def test_an_expert_keeps_the_first_or_the_heaviest_tokens_of_each_document(drop, rounding, lengths, factor, least):
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).repeat(2, 1)
    documents[1] = documents[1].flip(0)  # any numbers will do, in any order
    expert, capacity = chosen(*documents.shape), room(factor, drop=drop, rounding=rounding, min=least)
    assert torch.equal(kept(capacity, expert, documents), one_by_one(capacity, expert, documents))


def test_room_for_all_drops_nothing():
    assert kept(room(E / K), chosen(2, 8), torch.zeros(2, 8, dtype=torch.int64)).all()


@pytest.mark.parametrize("drop", ["position", "weight"])
def test_nowhere_takes_no_room_and_is_not_kept(drop):
    expert = chosen(1, 8)
    expert[:, ::2] = NOWHERE
    keep = kept(room(E / K, drop=drop), expert, torch.zeros(1, 8, dtype=torch.int64))
    assert torch.equal(keep, expert != NOWHERE)


def test_even_use_of_the_experts_drops_nothing_at_a_factor_of_one():
    expert = torch.tensor([[[0, 1], [2, 3], [1, 0], [3, 2]]])
    assert kept(room(1.0), expert, torch.zeros(1, 4, dtype=torch.int64)).all()


@pytest.mark.parametrize(("rounding", "expected"), [("floor", 49), ("ceil", 49)])
def test_an_even_share_that_is_a_whole_number_is_not_rounded(rounding, expected):
    found = room(1.0, rounding=rounding).room(torch.tensor([49 * 49]), 49, 1, training=True)
    assert found.tolist() == [expected]


def test_switch_rounds_down_and_leaves_room_for_four():
    found = Capacity(factor=1.25).room(torch.tensor([1, 30, 100]), 8, 1, training=True)
    assert found.tolist() == [4, 4, 15]


def test_evaluation_has_its_own_factor():
    capacity = Capacity(factor=1.25, eval_factor=2.0)
    length = torch.tensor([100])
    assert capacity.room(length, 8, 1, training=True).tolist() == [15]
    assert capacity.room(length, 8, 1, training=False).tolist() == [25]


@pytest.mark.parametrize("drop", ["position", "weight"])
@pytest.mark.parametrize("cut", [1, 5, 8])
def test_a_document_is_limited_as_if_it_were_alone(cut, drop):
    expert, documents, capacity = chosen(1, 9), (torch.arange(9) >= cut).long()[None], room(0.5, drop=drop)
    packed = kept(capacity, expert, documents)
    alone = []
    for part in (slice(0, cut), slice(cut, 9)):
        zeros = torch.zeros_like(documents[:, part])
        alone.append(capacity.kept(expert[:, part], weights(1, 9)[:, part], zeros, E, training=True))
    assert torch.equal(packed, torch.cat(alone, 1))


@pytest.mark.parametrize(("drop", "blind"), [("position", True), ("weight", False)])
def test_only_by_position_later_tokens_do_not_push_out_earlier_ones(drop, blind):
    expert, documents = chosen(1, 9), torch.zeros(1, 9, dtype=torch.int64)
    other = expert.clone()
    other[:, 5:] = chosen(1, 4, seed=1)
    heavier, capacity = torch.arange(18).view(1, 9, K) / 18, room(0.5, drop=drop)
    early = [capacity.kept(each, heavier, documents, E, training=True)[:, :5] for each in (expert, other)]
    assert torch.equal(*early) == blind


def test_weights_that_differ_by_a_rounding_are_equal():
    expert, documents = torch.zeros(1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    for first in (0.4, 0.4 - 1e-7, 0.4 + 1e-7):
        weight = torch.tensor([[[first], [0.4]]], dtype=torch.float64)
        keep = room(0.5, drop="weight", min=1).kept(expert, weight, documents, E, training=True)
        assert keep.flatten().tolist() == [True, False]
