from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core import units

SCALE = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (7, "7"), (999, "999"), (1234567, "1.23M"), (12_300, "12.3K"), (1.5e12, "1.50T")]
)
def test_counts_are_in_thousands(value: float, text: str):
    assert units.count(value) == text


@given(st.integers(1000, 10**18))
def test_printed_count_is_within_one_percent(value: int):
    text = units.count(value)
    assert float(text[:-1]) * SCALE[text[-1]] == pytest.approx(value, rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (1536, "1.50 KiB"), (2**30, "1.00 GiB"), (200 * 2**20, "200 MiB")]
)
def test_bytes_are_in_powers_of_1024(value: float, text: str):
    assert units.bytes_(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "12.3 ms"), (1.5, "1.5 s"), (75, "1m15s"), (7322, "2h02m"), (100_000, "1d03h"), (3599.6, "1h00m")],
)
def test_times_take_the_two_largest_units(value: float, text: str):
    assert units.seconds(value) == text
