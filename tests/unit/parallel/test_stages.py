from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from shardforge.core.errors import LayoutError
from shardforge.parallel import stages
from shardforge.parallel.stages import ORDERS, Work, balance, cut, read, write

EVEN = Work(0.0, (1.0,) * 12, 0.0)


def largest(work: Work, layers: tuple[int, ...]) -> float:
    return max(_costs(work, layers))


def _costs(work: Work, layers: tuple[int, ...]) -> list[float]:
    ends = list(itertools.accumulate(layers, initial=0))
    last = len(layers) - 1
    return [work.of(ends[n], ends[n + 1], first=n == 0, last=n == last) for n in range(len(layers))]


@pytest.mark.parametrize(
    ("schedule", "pp", "held"),
    [
        ("gpipe", 3, [(0,), (1,), (2,)]),
        ("1f1b", 2, [(0,), (1,)]),
        ("interleaved", 2, [(0, 2), (1, 3)]),
        ("zero_bubble", 3, [(0, 3), (1, 4), (2, 5)]),
        ("zbv", 3, [(0, 5), (1, 4), (2, 3)]),
        ("dualpipev", 2, [(0, 3), (1, 2)]),
    ],
)
def test_each_schedule_has_its_stages_on_its_ranks(schedule, pp, held):
    found = cut(schedule, pp, None, EVEN)
    assert [found.held(rank) for rank in range(pp)] == held


def test_a_longer_line_gives_an_interleaved_schedule_more_stages_a_rank():
    assert cut("interleaved", 2, "2 x 6", EVEN).held(1) == (1, 3, 5)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("3 | 4 x 6 | 3", (3, 4, 4, 4, 4, 4, 4, 3)), ("5|7", (5, 7)), ("12", (12,)), (" 0 | 6x2 | 0 ", (0, 6, 6, 0))],
)
def test_a_line_says_the_layers_of_each_stage(text, layers):
    assert read(text) == layers


@given(some.lists(some.integers(0, 9), min_size=1, max_size=12))
def test_a_line_is_read_as_it_was_written(layers):
    assert read(write(layers)) == tuple(layers)


@pytest.mark.parametrize("text", ["", "3 |", "three | 9", "4 x 0 | 12", "4 x | 8", "-3 | 15", "3, 9", "4 x 2 x 1 | 4"])
def test_a_line_that_cannot_be_read_is_refused_with_one_that_can(text):
    with pytest.raises(LayoutError, match="cannot read") as caught:
        cut("1f1b", 2, text, EVEN)
    read(caught.value.fix.split("'")[1])


@pytest.mark.parametrize(
    ("schedule", "text", "told"),
    [
        ("1f1b", "4 x 3", "is 3, 1f1b over pp=2 needs 2"),
        ("interleaved", "4 x 3", "is 3, interleaved over pp=2 needs a multiple of 2"),
        ("zbv", "6 x 2", "is 2, zbv over pp=2 needs 4"),
        ("dualpipev", "2 x 6", "is 6, dualpipev over pp=2 needs 4"),
        ("1f1b", "6 | 7", "add up to 13, the model has 12"),
        ("interleaved", "6 | 0 | 3 x 2", "leaves stage 1 of 4 without a layer"),
    ],
)
def test_a_line_that_does_not_fit_is_refused_with_both_numbers_and_one_that_does(schedule, text, told):
    with pytest.raises(LayoutError, match=told) as caught:
        cut(schedule, 2, text, EVEN)
    assert sum(cut(schedule, 2, caught.value.fix.split("'")[1], EVEN).layers) == 12


@pytest.mark.parametrize("text", [None, "1 x 13"])
def test_more_stages_than_layers_are_refused_with_both_numbers(text):
    with pytest.raises(LayoutError, match="13") as caught:
        cut("1f1b", 13, text, EVEN)
    assert "12" in str(caught.value)


def test_the_ends_may_stay_without_a_layer():
    assert cut("1f1b", 4, "0 | 6 x 2 | 0", EVEN).layers == (0, 6, 6, 0)


@settings(max_examples=60, deadline=None)
@given(
    some.lists(some.integers(1, 9), min_size=2, max_size=8),
    some.integers(2, 4),
    some.integers(0, 9),
    some.integers(0, 20),
)
def test_no_cut_has_a_cheaper_largest_stage_than_the_balanced_one(blocks, count, first, last):
    count = min(count, len(blocks))
    work = Work(float(first), tuple(map(float, blocks)), float(last))
    found = balance(work, count)
    every = [
        tuple(b - a for a, b in itertools.pairwise((0, *inner, len(blocks))))
        for inner in itertools.combinations_with_replacement(range(len(blocks) + 1), count - 1)
    ]
    allowed = [layers for layers in every if all(layers[1:-1])]
    assert found in allowed
    best = min(largest(work, layers) for layers in allowed)
    assert largest(work, found) == best
    ties = [sum(c * c for c in _costs(work, layers)) for layers in allowed if largest(work, layers) == best]
    assert sum(c * c for c in _costs(work, found)) == min(ties)


def test_a_dear_head_takes_layers_from_the_last_stage():
    assert balance(Work(0.0, (1.0,) * 12, 3.0), 3) == (5, 5, 2)


def test_the_table_names_ranks_layers_and_shares():
    lines = cut("zbv", 2, "2 | 4 | 4 | 2", Work(1.0, (1.0,) * 12, 2.0)).table().splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["0", "0", "embedding,", "0-1", "20.0", "%"],
        ["1", "1", "2-5", "26.7", "%"],
        ["2", "1", "6-9", "26.7", "%"],
        ["3", "0", "10-11,", "head", "26.7", "%"],
    ]
    assert lines[5] == "2 | 4 x 2 | 2: the largest stage is 1.07 of the mean"


@pytest.mark.parametrize(
    ("schedule", "works", "fails"),
    [
        ("gpipe", (1, 3, 8), ()),
        ("1f1b", (4, 5, 8), (1, 3)),
        ("interleaved", (1, 3, 4, 7, 8, 10, 12), (9, 11)),
        ("zero_bubble", (2, 8, 16), (9, 13)),
        ("zbv", (1, 3, 8), ()),
        ("dualpipev", (8, 9), (4, 7)),
    ],
)
def test_each_schedule_runs_its_numbers_of_micro_batches(schedule, works, fails):
    assert [stages.accepts(schedule, 4, count) for count in (*works, *fails)] == [True] * len(works) + [False] * len(
        fails
    )


@pytest.mark.parametrize("schedule", [name for name in ORDERS if not stages.accepts(name, 4, 2)])
def test_too_few_micro_batches_are_refused_with_a_size_that_works(schedule):
    with pytest.raises(LayoutError, match="cannot run 2 micro-batches") as caught:
        stages.check_micro_batches(schedule, 4, 2, 16)
    size = int(caught.value.fix.split()[1])
    stages.check_micro_batches(schedule, 4, 16 // size, 16)


def test_too_few_sequences_for_any_size_say_so():
    with pytest.raises(LayoutError, match="more sequences: a data rank has 3"):
        stages.check_micro_batches("1f1b", 4, 3, 3)
