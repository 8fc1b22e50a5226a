from __future__ import annotations

import math

import pytest
import torch

from shardforge.nn import counter

COUNT = 1 << 20
INDEX = torch.arange(COUNT)


def splitmix(seed: int, count: int) -> list[int]:
    """Steele, Lea, Flood 2014, figure 17, in whole numbers."""
    out, whole = [], (1 << 64) - 1
    for number in range(count):
        x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & whole
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        out.append(x ^ (x >> 31))
    return out


def share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


@pytest.mark.parametrize("key", [0, 1, counter.key(7, "blocks.0.mixer.q.weight"), (1 << 63) - 1])
def test_bits_are_those_of_splitmix_in_whole_numbers(key):
    drawn = [value % (1 << 64) for value in counter.bits(key, torch.arange(200)).tolist()]
    assert drawn == splitmix(key, 200)


def test_the_first_bits_of_seed_0_are_the_published_ones():
    assert [hex(value % (1 << 64)) for value in counter.bits(0, torch.arange(2)).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
    ]


@pytest.mark.parametrize("draw", [counter.bits, counter.uniform, counter.normal])
def test_any_slice_draws_what_the_whole_draws(draw):
    whole = draw(5, torch.arange(999))
    some = torch.tensor([[998, 0, 17], [3, 3, 512]])
    assert torch.equal(draw(5, some), whole[some])
    assert torch.equal(torch.cat([draw(5, part) for part in torch.arange(999).split(100)]), whole)


def test_a_key_in_a_tensor_is_the_same_key():
    assert torch.equal(counter.uniform(torch.tensor(77), INDEX), counter.uniform(77, INDEX))


def test_keys_differ_by_every_part():
    keys = {counter.key(*parts) for parts in ((1, "a"), (2, "a"), (1, "b"), ("a", 1), (1,), (1, "a", 0))}
    assert len(keys) == 6


def test_a_key_is_the_same_for_ever():
    assert counter.key(1, "embed.weight") == 0x7B6AEEAD5B3DFFD5


def test_keys_fit_into_int64():
    assert all(0 <= counter.key(number) < 1 << 63 for number in range(1000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_is_at_least_0_and_below_1(dtype):
    drawn = counter.uniform(3, INDEX, dtype)
    assert 0 <= drawn.min() < 1e-5 and 1 - 1e-5 < drawn.max() < 1


def test_uniform_fills_256_bins_evenly():
    bins = (counter.uniform(3, INDEX) * 256).long().bincount(minlength=256)
    expected = COUNT / 256
    chi = ((bins - expected).square() / expected).sum().item()
    assert abs(chi - 255) < 5 * math.sqrt(2 * 255)


def test_normal_has_mean_0_and_variance_1():
    drawn = counter.normal(4, INDEX, torch.float64)
    assert abs(drawn.mean()) < 5 / math.sqrt(COUNT)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / COUNT)


@pytest.mark.parametrize(("limit", "chance"), [(1, 0.3173105), (2, 0.0455003), (3, 0.0026998), (4, 6.334e-5)])
def test_the_tails_of_normal_are_those_of_a_normal(limit, chance):
    found = share(counter.normal(4, INDEX).abs() > limit)
    assert abs(found - chance) < 5 * math.sqrt(chance / COUNT)


def test_normal_is_finite_at_the_ends_of_its_bits(monkeypatch):
    ends = torch.tensor([0, -1, 0xFFFFFFFF, -(1 << 32)])
    monkeypatch.setattr(counter, "bits", lambda key, index: ends)
    drawn = counter.normal(0, ends, torch.float64)
    assert drawn.isfinite().all() and drawn.abs().max() < 6.7


def test_float32_weights_are_the_float64_weights_rounded_once():
    assert torch.equal(counter.normal(9, INDEX), counter.normal(9, INDEX, torch.float64).float())


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 2), (counter.key(0, "a"), counter.key(0, "b")), (counter.key(0, 1), counter.key(0, 1) ^ counter.key("x"))],
    ids=["neighbours", "names", "salted"],
)
def test_draws_of_different_keys_are_uncorrelated(one, other):
    product = counter.normal(one, INDEX, torch.float64) * counter.normal(other, INDEX, torch.float64)
    assert abs(product.mean()) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 64, 4096])
def test_draws_of_neighbouring_indices_are_uncorrelated(lag):
    drawn = counter.normal(6, INDEX, torch.float64)
    assert abs((drawn[lag:] * drawn[:-lag]).mean()) < 5 / math.sqrt(COUNT - lag)
