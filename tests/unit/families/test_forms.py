from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.families.forms import (
    EXPERTS,
    SAME,
    SIDE_BY_SIDE,
    TURNED,
    Alternating,
    Chain,
    Form,
    Padded,
    Paired,
    QueryGroups,
    Reversed,
    Rows,
    Stacked,
)

WHOLE = torch.arange(24.0).view(6, 4)
SIZES = st.integers(1, 5)
TAILS = st.lists(SIZES, max_size=2)  # dimensions behind the one that a form cuts: none for a bias


def numbered(*shape: int, start: int = 0) -> Tensor:
    """No two numbers alike."""
    return torch.arange(start, start + torch.Size(shape).numel()).view(shape)


def several(count: int, *shape: int) -> list[Tensor]:
    return [numbered(*shape, start=1000 * each) for each in range(count)]


@st.composite
def cut(draw: st.DrawFn) -> tuple[Form, list[Tensor]]:
    """A form, and tensors of theirs that it can take."""
    one, two, three, tail = draw(SIZES), draw(SIZES), draw(SIZES), draw(TAILS)
    half, start, end = draw(SIZES), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    pairs = Paired(one, 2 * half, start)
    heads = numbered(one * (start + 2 * half + end), *tail)
    groups = numbered(one * (two + 2) * three, *tail)
    return draw(
        st.sampled_from(
            [
                (SAME, several(one, *tail)),
                (TURNED, several(one, two, *tail)),
                (Rows(one), [numbered(one * two, *tail)]),
                (Rows(one, 1), [numbered(three, one * two, *tail)]),
                (Alternating(one), [numbered(*tail, one * two)]),
                (QueryGroups(one, three), [groups]),
                (Stacked(), several(one, *tail)),
                (EXPERTS, several(one, two, three)),
                (SIDE_BY_SIDE, [numbered(*tail[:1], 3 * two)]),
                (pairs, [heads]),
                (Reversed(pairs), [heads]),
                (Reversed(Rows(one)), several(one, two, *tail)),
                (Chain((Rows(2), Stacked(), TURNED)), [numbered(2 * two, three)]),
                (Chain((QueryGroups(one, 2 * half), SAME)), [numbered(one * (two + 2) * 2 * half, *tail)]),
            ]
        )
    )


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


@given(cut())
def test_theirs_come_back_from_ours_bit_for_bit(case):
    form, theirs = case
    assert same(list(form.theirs(form.ours(theirs))), theirs)


@given(cut())
def test_ours_come_back_from_theirs_bit_for_bit(case):
    form, theirs = case
    ours = list(form.ours(theirs))
    assert same(list(form.ours(form.theirs(ours))), ours)


@given(cut())
def test_shapes_are_known_without_numbers(case):
    form, theirs = case
    blank = form.ours([torch.empty(each.shape, device="meta") for each in theirs])
    assert [each.shape for each in blank] == [each.shape for each in form.ours(theirs)]


@given(cut())
def test_no_number_is_lost_or_made(case):
    form, theirs = case
    before, after = (torch.cat([each.flatten() for each in group]) for group in (theirs, form.ours(theirs)))
    assert torch.equal(before.sort().values, after.sort().values)


@given(SIZES, st.integers(0, 4), TAILS)
def test_padding_is_added_as_zeros_and_taken_off_again(rows, more, tail):
    table = numbered(rows, *tail, start=1)
    (padded,) = Padded(rows, rows + more).theirs([table])
    assert len(padded) == rows + more and not padded[rows:].any()
    assert same(list(Padded(rows, rows + more).ours([padded])), [table])


def test_a_weight_of_its_own_stays_as_it_is():
    assert SAME.ours([WHOLE])[0] is WHOLE


@pytest.mark.parametrize("leaf", [WHOLE.T, torch.arange(6.0)], ids=["matrix", "bias"])
def test_columns_side_by_side_are_cut_and_turned(leaf):
    parts = SIDE_BY_SIDE.ours([leaf])
    whole = leaf.T if leaf.dim() == 2 else leaf
    assert torch.equal(torch.cat(list(parts)), whole) and [len(part) for part in parts] == [2, 2, 2]


def test_rows_below_each_other_are_cut():
    gate, up = Rows(2).ours([WHOLE])
    assert torch.equal(gate, WHOLE[:3]) and torch.equal(up, WHOLE[3:])


def test_numbers_that_take_turns_are_sorted_out():
    gate, up = Alternating().ours([WHOLE])
    assert torch.equal(gate, WHOLE[:, ::2]) and torch.equal(up, WHOLE[:, 1::2])


def test_neighbours_that_turn_together_become_halves():
    # one head: a channel that stands still, four that turn, one that stands still
    (rows,) = Paired(1, 4, 1).ours([torch.arange(6)])
    assert rows.tolist() == [0, 1, 3, 2, 4, 5]


@pytest.mark.parametrize("shape", [(16, 5), (16,)], ids=["matrix", "bias"])
def test_groups_of_queries_give_their_heads_in_order(shape):
    # two groups of two query heads, one key and one value head, each of width 2
    whole = torch.arange(16).view(16, *[1] * (len(shape) - 1)).expand(shape)
    q, k, v = (part[..., 0].tolist() if part.dim() > 1 else part.tolist() for part in QueryGroups(2, 2).ours([whole]))
    assert (q, k, v) == ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15])


def test_experts_are_stacked_as_inputs_by_outputs():
    (stack,) = EXPERTS.ours(several(3, 4, 2))
    assert stack.shape == (3, 2, 4) and torch.equal(stack[1], several(3, 4, 2)[1].T)
