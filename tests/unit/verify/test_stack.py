from __future__ import annotations

from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.verify.stack import shortened

STACKS = st.lists(st.sampled_from("abc"), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("stack", "short"),
    [
        (["a"] * 30, "aa"),
        (["d"] * 3 + ["m"] * 58, "ddmm"),
        ((["a"] * 5 + ["b"]) * 10, "aabab"),
        (["a"], "a"),
        (["a", "b"], "ab"),
    ],
)
def test_a_long_stack_becomes_the_short_one_with_the_same_neighbours(stack: list[str], short: str):
    assert "".join(shortened(stack)) == short


@given(STACKS)
def test_neighbours_are_those_of_the_whole_stack(stack: list[str]):
    assert set(pairwise(shortened(stack))) == set(pairwise(stack))


@given(STACKS)
def test_the_ends_are_those_of_the_whole_stack(stack: list[str]):
    short = shortened(stack)
    assert (short[0], short[-1]) == (stack[0], stack[-1])


@given(STACKS, st.integers(1, 12))
def test_there_are_as_many_layers_as_asked_for_where_the_stack_has_them(stack: list[str], layers: int):
    assert min(layers, len(stack)) <= len(shortened(stack, layers)) <= max(len(stack), layers + 2)


@given(STACKS, st.integers(1, 12))
def test_more_layers_bring_no_new_neighbours(stack: list[str], layers: int):
    assert set(pairwise(shortened(stack, layers))) == set(pairwise(stack))


def test_runs_grow_evenly():
    runs = [len(list(group)) for _, group in groupby(shortened(["d"] * 9 + ["m"] * 9, 8))]
    assert runs == [4, 4]
