from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardforge.data.order import Blend, Drawn, Permutation, largest_remainder

SIZES = st.integers(1, 500)
KEYS = st.integers(0, 2**64 - 1)


@given(SIZES, KEYS)
def test_every_index_comes_exactly_once(size: int, key: int):
    assert sorted(Permutation(size, key).apply(np.arange(size)).tolist()) == list(range(size))


@given(st.integers(1, 2**61), KEYS, st.data())
def test_arrays_and_integers_agree_at_any_size(size: int, key: int, data: st.DataObject):
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    order = Permutation(size, key)
    assert order.apply(np.array(indices)).tolist() == [order[index] for index in indices]


def test_another_seed_epoch_or_source_is_another_order():
    orders = {
        tuple(Permutation(50, *key).apply(np.arange(50)).tolist())
        for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    }
    assert len(orders) == 4


@pytest.mark.parametrize("size", [16, 17, 100])
def test_every_place_is_equally_likely_over_keys(size: int):
    each = 50
    counts = np.bincount([Permutation(size, key)[3] for key in range(each * size)], minlength=size)
    chi_square = ((counts - each) ** 2 / each).sum()
    assert abs(chi_square - (size - 1)) < 5 * np.sqrt(2 * (size - 1))


def test_neighbours_are_sent_to_unrelated_places():
    size = 10_007
    out = Permutation(size, 5).apply(np.arange(size))
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(out, np.arange(size))[0, 1]) < 0.05


def blend(sizes: list[int], shares: list[Fraction | int], **options: object) -> Blend:
    return Blend(sizes, [Fraction(share) for share in shares], **{"seed": 0, "shuffled": True, **options})


@settings(max_examples=12)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 9), st.booleans())
def test_each_source_gives_every_sample_once_an_epoch(sizes: list[int], seed: int, shuffled: bool):
    drawn = blend(sizes, sizes, seed=seed, shuffled=shuffled).draw(0, 5000)
    for source, size in enumerate(sizes):
        own = [d for d in drawn if d.source == source]
        for epoch in range(len(own) // size):
            assert sorted(d.sample for d in own if d.epoch == epoch) == list(range(size))


@given(st.integers(0, 10**15), st.integers(1, 30))
def test_samples_do_not_depend_on_how_they_are_asked_for(first: int, count: int):
    one, other = blend([70, 10**9], [1, 3]), blend([70, 10**9], [1, 3])
    singly = [other.draw(number, 1)[0] for number in reversed(range(first, first + count))]
    assert one.draw(first, count) == singly[::-1]


def test_shares_are_kept_to_within_a_sample_however_small():
    tiny = Fraction(1, 10**7)
    order = blend([5, 10**9], [tiny, 1])
    blocks = 3_000_000
    assert order.before(blocks)[0] == int(blocks * order.block * tiny / (1 + tiny))
    assert sum(order.before(blocks)) == blocks * order.block


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=90))
def test_no_source_ever_gives_samples_back(shares: list[int]):
    order = blend([1] * len(shares), shares)
    assert (np.diff([order.before(block) for block in range(9)], axis=0) >= 0).all()


def test_unshuffled_sources_come_in_corpus_order():
    drawn = blend([40, 60], [40, 60], shuffled=False).draw(0, 4096)
    for source, size in ((0, 40), (1, 60)):
        own = [(d.epoch, d.sample) for d in drawn if d.source == source]
        assert own == [divmod(number, size) for number in range(len(own))]


def test_one_unshuffled_source_is_read_from_front_to_back():
    assert blend([3], [1], shuffled=False).draw(0, 4) == [
        Drawn(0, 0, 0),
        Drawn(0, 0, 1),
        Drawn(0, 0, 2),
        Drawn(0, 1, 0),
    ]


def test_sources_are_mixed_inside_a_block():
    drawn = blend([10**6, 10**6], [1, 1]).draw(0, 256)
    assert 90 < Counter(d.source for d in drawn)[0] < 166


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.data())
def test_largest_remainder_never_takes_more_than_there_is(sizes: list[int], data: st.DataObject):
    total = data.draw(st.integers(0, sum(sizes)))
    parts = largest_remainder(total, sizes)
    assert sum(parts) == total and all(0 <= part <= size for part, size in zip(parts, sizes, strict=True))
