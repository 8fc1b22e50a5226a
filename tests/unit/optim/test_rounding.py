from __future__ import annotations

import math

import pytest
import torch

from shardforge.nn import counter
from shardforge.optim.rounding import stochastic

DRAWS = 1 << 16
BETWEEN = [1 + 2**-9, 1 + 3 * 2**-10, -(1 + 2**-9), 1e-30, 3.14159e20, 1e-40]


def neighbours(value: float) -> tuple[float, float]:
    """The bfloat16 numbers on both sides of a float32, nearer to zero first."""
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32) & -(1 << 16)
    low, high = bits.view(torch.float32), (bits + (1 << 16)).view(torch.float32)
    return low.item(), high.item()


def every(value: float) -> torch.Tensor:
    """The results of all draws."""
    return stochastic(torch.full((DRAWS,), value), torch.arange(DRAWS)).double()


@pytest.mark.parametrize("value", BETWEEN)
def test_a_number_becomes_one_of_its_neighbours(value):
    assert set(every(value).tolist()) == set(neighbours(value))


@pytest.mark.parametrize("value", BETWEEN)
def test_the_mean_over_all_draws_is_the_number(value):
    exact = torch.tensor(value, dtype=torch.float32).double().item()
    low, high = neighbours(value)
    assert math.isclose(every(value).mean().item(), exact, rel_tol=1e-12, abs_tol=abs(high - low) * 2**-16)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 2.0**-126, math.inf, -math.inf])
def test_what_bfloat16_holds_stays_as_it_is(value):
    found = every(value)
    assert set(found.tolist()) == {value}
    assert set(torch.signbit(found).tolist()) == {math.copysign(1, value) < 0}


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_no_draw_makes_a_number_of_nan(bits):
    bad = torch.full((DRAWS,), bits, dtype=torch.int32).view(torch.float32)
    assert stochastic(bad, torch.arange(DRAWS)).isnan().all()


def test_only_the_lowest_16_bits_of_a_draw_count():
    x, draw = torch.randn(1000, generator=torch.Generator().manual_seed(0)), counter.bits(7, torch.arange(1000))
    assert torch.equal(stochastic(x, draw), stochastic(x, draw & 0xFFFF))
    assert not torch.equal(stochastic(x, draw), stochastic(x, draw >> 16))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (5, 1)])
def test_any_shape_and_float64_are_rounded_alike(shape):
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    draw = counter.bits(1, torch.arange(wide.numel()).view(shape))
    assert stochastic(wide, draw).shape == shape
    assert torch.equal(stochastic(wide, draw), stochastic(wide.float(), draw))


def test_a_transposed_view_is_rounded_as_its_copy():
    x, draw = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).T,
        counter.bits(1, torch.arange(24).view(6, 4)),
    )
    assert torch.equal(stochastic(x, draw), stochastic(x.contiguous(), draw))
