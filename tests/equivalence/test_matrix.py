"""Law 4 over the product of layouts, models, schedules and options: a sample in which every pair of values occurs.

`make verify-all` runs the whole product instead, in as many parts as you like: PART=3/16 make verify-all.
"""

from __future__ import annotations

import functools
import itertools
import os

import pytest

from shardforge.core.layout import Layout
from tests.equivalence import matrix
from tests.equivalence.matrix import Row
from tests.equivalence.rows import two_steps
from tests.tiny import assert_same


@pytest.fixture(scope="module")
def alone(ranks):
    """(model, data) -> the two steps of one process, computed once."""
    return functools.cache(lambda model, data: ranks(1).run(two_steps, Layout(), matrix.MODELS[model], data)[0])


def compare(ranks, alone, row: Row) -> None:
    layout = matrix.layout(row)
    got = ranks(layout.world_size).run(two_steps, layout, matrix.changes(row), row["data"])[0]
    assert_same(got, alone(row["model"], row["data"]))


@pytest.mark.parametrize("row", matrix.pairwise(), ids=matrix.title)
def test_a_sample_with_every_pair_of_values_equals_one_process(ranks, alone, row):
    compare(ranks, alone, row)


@pytest.mark.parametrize("row", matrix.large(), ids=matrix.title)
def test_layouts_of_eight_ranks_equal_one_process(ranks, alone, row):
    compare(ranks, alone, row)


def test_the_sample_has_every_pair_of_values_that_fits_together():
    seen = {pair for row in matrix.pairwise() for pair in itertools.combinations(sorted(row.items()), 2)}
    missing = [pair for pair in matrix.possible() if tuple(sorted(pair)) not in seen]
    assert not missing


@pytest.mark.full
@pytest.mark.timeout(0)
def test_the_whole_product_equals_one_process(ranks, alone):
    part, parts = (int(number) for number in os.environ.get("PART", "1/1").split("/"))
    wrong = []
    for number, row in enumerate(itertools.islice(matrix.product(), part - 1, None, parts)):
        try:
            compare(ranks, alone, row)
        except AssertionError as error:
            wrong.append(f"{matrix.title(row)}: {error}")
        if number % 100 == 0:
            print(f"{number} rows, {len(wrong)} wrong, now {matrix.title(row)}", flush=True)
    assert not wrong, "\n\n".join(wrong)
