from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.model.groups import highest, limited
from tests.tiny_routers import sets


def scores(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_the_highest_are_those_of_a_stable_sort(e, k, values, seed):
    generator = torch.Generator().manual_seed(seed)
    few = torch.randint(0, values, (3, 4, e), generator=generator).double()
    k = min(k, e)
    assert torch.equal(highest(few, k), few.sort(dim=-1, descending=True, stable=True).indices[..., :k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equals_the_first_are_chosen_in_rows_of_any_length(dtype):
    for e in (3, 16, 64, 257):
        assert torch.equal(highest(torch.zeros(5, e, dtype=dtype), 3), torch.arange(3).expand(5, 3))


def test_the_highest_among_closed_ones_are_the_open_ones():
    closed = torch.full((1, 6), -torch.inf)
    closed[0, 4] = -5.0
    assert highest(closed, 1).item() == 4


def test_the_scores_are_left_as_they_were():
    before = scores(4, 8)
    after = before.clone()
    highest(after, 3)
    limited(after, 4, 2, "max", 1)
    assert torch.equal(before, after)


@pytest.mark.parametrize("score", ["top_sum", "max"])
def test_the_choice_is_the_best_of_all_choices_of_groups(score):
    """16 experts in 4 groups, 2 groups and 4 experts for each token, against every pair and every four of its 8."""
    rows = scores(20, 16)
    found = highest(limited(rows, 4, 2, score, 2), 4)
    for row, chosen in zip(rows, sets(found).tolist(), strict=True):

        def worth(group: int, row: Tensor = row) -> float:
            inside = row[4 * group : 4 * group + 4]
            return (inside.topk(2).values.sum() if score == "top_sum" else inside.max()).item()

        pair = max(itertools.combinations(range(4), 2), key=lambda pair: sum(worth(group) for group in pair))
        open_to = [4 * group + place for group in pair for place in range(4)]
        best = max(itertools.combinations(open_to, 4), key=lambda four: row[list(four)].sum().item())
        assert chosen == sorted(best)


@given(st.sampled_from([(16, 4, 2), (16, 8, 3), (12, 3, 1), (64, 8, 4)]), st.floats(-9, 9), st.integers(0, 99))
def test_no_more_groups_than_allowed_are_reached(sizes, shift, seed):
    e, groups, kept = sizes
    k = kept * (e // groups) // 2
    expert = highest(limited(scores(8, e, seed=seed) + shift, groups, kept, "top_sum", 1), k)
    reached = [len(set(row)) for row in (expert // (e // groups)).tolist()]
    assert max(reached) <= kept


@pytest.mark.parametrize("score", ["top_sum", "max"])
def test_one_group_that_is_kept_closes_nothing(score):
    rows = scores(7, 8)
    assert torch.equal(limited(rows, 1, 1, score, 4), rows)


def test_of_equal_groups_the_first_are_kept():
    assert torch.equal(limited(torch.zeros(1, 6), 3, 2, "max", 1).isfinite(), torch.tensor([[True] * 4 + [False] * 2]))
