from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.model.capacity import kept

E, K = 4, 2


def chosen(b: int, s: int, seed: int = 0) -> Tensor:
    """[b, s, K] different experts of each token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, s, E, generator=generator).argsort(-1)[..., :K]


def one_by_one(expert: Tensor, documents: Tensor, capacity: float) -> Tensor:
    """kept, by counting."""
    out = torch.zeros_like(expert, dtype=torch.bool)
    for row, numbers in enumerate(documents.tolist()):
        seen: dict[tuple[int, int], int] = {}
        for place, document in enumerate(numbers):
            room = math.ceil(capacity * numbers.count(document) * K / E)
            for slot, each in enumerate(expert[row, place].tolist()):
                out[row, place, slot] = seen.get((document, each), 0) < room
                seen[document, each] = seen.get((document, each), 0) + 1
    return out


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0]))
def test_an_expert_keeps_the_first_tokens_of_each_document_that_chose_it(lengths, capacity):
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).repeat(2, 1)
    documents[1] = documents[1].flip(0)  # any numbers will do, in any order
    expert = chosen(*documents.shape)
    assert torch.equal(kept(expert, documents, E, capacity), one_by_one(expert, documents, capacity))


def test_room_for_all_drops_nothing():
    documents = torch.zeros(2, 8, dtype=torch.int64)
    assert kept(chosen(2, 8), documents, E, E / K).all()


def test_even_use_of_the_experts_drops_nothing_at_capacity_one():
    expert = torch.tensor([[[0, 1], [2, 3], [1, 0], [3, 2]]])
    assert kept(expert, torch.zeros(1, 4, dtype=torch.int64), E, 1.0).all()


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_a_document_is_limited_as_if_it_were_alone(cut):
    expert, documents = chosen(1, 9), (torch.arange(9) >= cut).long()[None]
    packed = kept(expert, documents, E, 0.5)
    parts = expert.split([cut, 9 - cut], 1)
    alone = [kept(part, torch.zeros(part.shape[:2], dtype=torch.int64), E, 0.5) for part in parts]
    assert torch.equal(packed, torch.cat(alone, 1))


def test_later_tokens_do_not_push_out_earlier_ones():
    expert, documents = chosen(1, 9), torch.zeros(1, 9, dtype=torch.int64)
    other = expert.clone()
    other[:, 5:] = chosen(1, 4, seed=1)
    assert torch.equal(kept(expert, documents, E, 0.5)[:, :5], kept(other, documents, E, 0.5)[:, :5])
