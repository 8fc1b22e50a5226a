from __future__ import annotations

import math

import pytest
import torch

from shardforge.convert import lockstep
from shardforge.convert.lockstep import unequal

WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_is_what_it_was_cast_to(dtype):
    assert unequal(WEIGHT, WEIGHT.to(dtype), torch.float32) is None


def test_numbers_that_were_widened_to_compute_are_what_they_were():
    stored = WEIGHT.bfloat16()
    assert unequal(stored.float(), stored, torch.bfloat16) is None


def test_the_first_of_all_that_differ_is_named():
    other = WEIGHT.clone()
    other[2, 3], other[3, 5] = 7.0, 8.0
    count, at, want, got = unequal(WEIGHT, other, torch.float32)
    assert (count, at, got) == (2, (2, 3), 7.0) and want == float(WEIGHT[2, 3])


def test_what_differs_behind_the_first_piece_is_found_there(monkeypatch):
    monkeypatch.setattr(lockstep, "PIECE", 5)
    other = WEIGHT.clone()
    other[3, 1] = 7.0
    assert unequal(WEIGHT, other, torch.float32)[:2] == (1, (3, 1))


def test_a_zero_of_the_other_sign_differs():
    assert unequal(torch.tensor([0.0]), torch.tensor([-0.0]), torch.float32)[0] == 1


def test_what_is_no_number_equals_what_is_none():
    assert unequal(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0]), torch.float32) is None
    assert unequal(torch.tensor([math.nan]), torch.tensor([1.0]), torch.float32)[0] == 1


def test_a_single_number_has_no_place():
    assert unequal(torch.tensor(1.0), torch.tensor(2.0), torch.float32) == (1, (), 1.0, 2.0)
