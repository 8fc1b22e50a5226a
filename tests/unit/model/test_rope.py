from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.model.positions.rope import RopeConfig
from shardforge.nn.sequence import Sequence

D = 8


def vectors(s: int, d: int = D) -> Tensor:
    return torch.randn(1, s, 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def turned(x: Tensor, positions: Tensor, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    seq = Sequence(positions[None], torch.zeros_like(positions)[None], torch.zeros(1, dtype=torch.int64), dtype=dtype)
    rope = RopeConfig(**options).build(x.shape[-1])
    rope.prepare(seq)
    return rope(x, seq)


def naive(x: list[float], position: int, base: float, turning: int) -> list[float]:
    """Eq. 34 with channel pairs (i, i + turning/2), in plain Python."""
    y = list(x)
    for i in range(turning // 2):
        angle = position * base ** (-2 * i / turning)
        a, b = x[i], x[i + turning // 2]
        y[i] = a * math.cos(angle) - b * math.sin(angle)
        y[i + turning // 2] = a * math.sin(angle) + b * math.cos(angle)
    return y


@pytest.mark.parametrize(("fraction", "base"), [(1.0, 10000.0), (0.5, 10000.0), (0.25, 500.0), (1.0, 1e6)])
def test_every_pair_turns_as_in_the_paper(fraction, base):
    positions = torch.tensor([0, 1, 5, 1000])
    x = vectors(4)
    expected = [
        [naive(x[0, s, n].tolist(), int(positions[s]), base, int(D * fraction)) for n in range(2)] for s in range(4)
    ]
    got = turned(x, positions, base=base, fraction=fraction)
    torch.testing.assert_close(got[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_position_0_leaves_vectors_as_they_are():
    x = vectors(3)
    assert torch.equal(turned(x, torch.zeros(3, dtype=torch.int64)), x)


def test_the_norm_of_a_head_stays():
    x = vectors(64)
    torch.testing.assert_close(turned(x, torch.arange(64) * 37).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1, 100, 5000])
def test_scores_depend_on_the_distance_only(shift):
    q, k = vectors(8), vectors(8).flip(1)

    def scores(start: int) -> Tensor:
        positions = torch.arange(8) + start
        return torch.einsum("bsnd,btnd->bnst", turned(q, positions), turned(k, positions))

    torch.testing.assert_close(scores(shift), scores(0), rtol=1e-9, atol=1e-9)


def test_float32_tables_are_exact_at_position_100000():
    x = vectors(1)
    got = turned(x.float(), torch.tensor([100_000]), torch.float32)
    torch.testing.assert_close(got.double(), turned(x, torch.tensor([100_000])), rtol=1e-6, atol=1e-6)


def test_channels_beyond_the_fraction_stay():
    x = vectors(5)
    assert torch.equal(turned(x, torch.arange(5), fraction=0.5)[..., D // 2 :], x[..., D // 2 :])


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_bfloat16_vectors_turn_in_the_type_of_the_tables_and_come_back(layout):
    x, positions = vectors(5).bfloat16(), torch.arange(5)
    got = turned(x, positions, torch.float32, layout=layout)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, turned(x.float(), positions, torch.float32, layout=layout).bfloat16())


def test_all_layers_share_one_table():
    seq = Sequence(torch.arange(4)[None], torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    for _ in range(3):
        RopeConfig().build(D).prepare(seq)
    RopeConfig(base=5.0).build(D).prepare(seq)
    assert len(seq.tables) == 2


def interleaved(x: Tensor) -> Tensor:
    """The channels (i, i + d/2) as (2i, 2i + 1)."""
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_the_two_layouts_are_one_function_up_to_the_order_of_channels(base):
    x, positions = vectors(6), torch.tensor([0, 1, 2, 7, 100, 3000])
    half = turned(x, positions, base=base)
    assert torch.equal(turned(interleaved(x), positions, base=base, layout="interleaved"), interleaved(half))


def test_interleaved_pairs_turn_as_in_equation_34():
    x, position = vectors(1), 5
    y = turned(x, torch.tensor([position]), layout="interleaved")[0, 0, 0]
    for i in range(D // 2):
        angle = position * 10000.0 ** (-2 * i / D)
        a, b = x[0, 0, 0, 2 * i : 2 * i + 2].tolist()
        expected = [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
        assert y[2 * i : 2 * i + 2].tolist() == pytest.approx(expected, rel=1e-12)


def test_tables_do_not_follow_the_type_of_the_model():
    def tables(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        seq = Sequence(torch.arange(4)[None] * 30000, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
        return RopeConfig().build(D).to(dtype).table(seq)

    assert all(map(torch.equal, tables(torch.bfloat16), tables(torch.float32)))


def test_an_odd_number_of_turning_channels_is_refused():
    with pytest.raises(RecipeError, match=r"head_dim=6 .* gives 3 turning channels"):
        RopeConfig(fraction=0.5).build(6)
