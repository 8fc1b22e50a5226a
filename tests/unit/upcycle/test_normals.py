from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from shardforge.upcycle.normals import BLOCK, Normals, quantiles

COUNT = 1 << 22
GOLDEN = [-1.6673314571380615, 0.05595707893371582, 2.439265251159668]


def stream(seed: int = 5) -> Normals:
    return Normals(np.random.Generator(np.random.SFC64(seed)))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return stream().draw(COUNT).astype(np.float64)


@pytest.mark.parametrize(("power", "expected", "variance"), [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)])
def test_moments_are_those_of_a_normal_distribution(drawn, power, expected, variance):
    assert np.mean(drawn**power) == pytest.approx(expected, abs=4 * (variance / COUNT) ** 0.5 + 1e-3)


@pytest.mark.parametrize("limit", [0.001, 0.1, 1.0, 2.0, 3.0, 4.0, 4.5])
def test_as_many_lie_beyond_a_limit_as_should(drawn, limit):
    chance = 2 * NormalDist().cdf(-limit)
    found = np.count_nonzero(np.abs(drawn) > limit)
    assert found == pytest.approx(COUNT * chance, abs=4 * (COUNT * chance * (1 - chance)) ** 0.5 + 1)


def test_the_two_numbers_of_a_pair_do_not_know_each_other(drawn):
    first, second = (drawn.reshape(-1, 2, BLOCK // 2)[:, i].ravel() for i in range(2))
    for power in (1, 2):
        found = np.corrcoef(first**power, second**power)[0, 1]
        assert abs(found) < 4 / (COUNT / 2) ** 0.5


def test_a_stream_does_not_depend_on_the_sizes_in_which_it_is_asked():
    whole, parts = stream().draw(3 * BLOCK + 7), stream()
    sizes = [1, BLOCK, 5, BLOCK - 1, BLOCK + 2]
    assert np.array_equal(whole, np.concatenate([parts.draw(size) for size in sizes]))


def test_a_matrix_is_filled_row_by_row():
    assert np.array_equal(stream().draw(6, 4).ravel(), stream().draw(24))


def test_the_first_numbers_of_a_seed_stay_what_they_are():
    assert stream(1).draw(3).tolist() == GOLDEN


def test_the_table_is_symmetric_and_has_half_the_variance():
    table = quantiles().astype(np.float64)
    assert np.array_equal(table, -table[::-1]) and np.all(np.diff(table) > 0)
    assert np.mean(table**2) == pytest.approx(0.5, rel=1e-6)
