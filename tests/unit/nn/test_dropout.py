from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shardforge.nn import counter
from shardforge.nn.dropout import Dropout
from shardforge.nn.sequence import Sequence

B, S, H = 8, 32, 64


def sequence(step: int | None = 0, rows: Tensor | None = None) -> Sequence:
    rows = torch.arange(B) if rows is None else rows
    positions = torch.arange(S).expand(len(rows), -1)
    key = None if step is None else torch.tensor(counter.key(1, "dropout", step))
    return Sequence(positions, torch.zeros_like(positions), rows, key)


def kept(rate: float = 0.3, site: tuple = (0, "ffn"), step: int = 0) -> Tensor:
    return Dropout(rate, *site)(torch.ones(B, S, H), sequence(step)) != 0


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_the_share_of_zeros_is_the_rate(rate):
    share = 1 - kept(rate).double().mean().item()
    assert abs(share - rate) < 5 * math.sqrt(rate * (1 - rate) / (B * S * H))


def test_what_stays_is_scaled_so_that_the_mean_stays():
    y = Dropout(0.2, 0, "ffn")(torch.full((B, S, H), 3.0, dtype=torch.float64), sequence())
    assert set(y.unique().tolist()) == {0.0, 3.0 / 0.8}


@pytest.mark.parametrize("parts", [2, 4])
def test_slices_of_the_sequence_drop_what_the_whole_drops(parts):
    x = torch.randn(B, S, H, generator=torch.Generator().manual_seed(0))
    one = Dropout(0.3, 0, "ffn")
    whole, slices = one(x, sequence()), []
    for part, piece in enumerate(x.chunk(parts, 1)):
        one.part, one.parts = part, parts
        slices.append(one(piece, sequence()))
    assert torch.equal(torch.cat(slices, 1), whole)


@pytest.mark.parametrize("parts", [1, 2])
def test_scattered_tokens_of_the_sequence_drop_what_the_whole_drops(parts):
    x = torch.randn(B, S, H, generator=torch.Generator().manual_seed(0))
    one, index = Dropout(0.3, 0, "ffn"), torch.tensor([4, 5, 6, 7, 24, 25, 26, 27])
    seq, slices = sequence(), []
    whole = one(x, seq)
    seq.index, seq.length = index, S
    for part, piece in enumerate(x[:, index].chunk(parts, 1)):
        one.part, one.parts = part, parts
        slices.append(one(piece, seq))
    assert torch.equal(torch.cat(slices, 1), whole[:, index])


def test_rows_of_a_batch_drop_what_the_whole_batch_drops():
    x, one = torch.ones(B, S, H), Dropout(0.3, 0, "ffn")
    some = torch.tensor([6, 1])
    assert torch.equal(one(x[some], sequence(rows=some)), one(x, sequence())[some])


def test_every_token_drops_other_channels():
    flat = kept(0.5).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in flat}) == B * S


@pytest.mark.parametrize("other", [{"step": 1}, {"site": (1, "ffn")}, {"site": (0, "mixer")}], ids=str)
def test_another_step_layer_or_branch_drops_independently(other):
    both = (~kept(0.5) & ~kept(0.5, **other)).double().mean().item()
    assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / (B * S * H))


def test_the_same_step_drops_the_same_again():
    assert torch.equal(kept(), kept())


def test_without_a_key_nothing_is_dropped():
    x = torch.ones(B, S, H)
    assert Dropout(0.9, 0, "ffn")(x, sequence(None)) is x


def test_rate_zero_returns_its_input():
    x = torch.ones(B, S, H)
    assert Dropout(0.0, 0, "ffn")(x, sequence()) is x


def test_dropped_numbers_get_no_gradient_and_kept_ones_the_scale():
    x = torch.ones(B, S, H, dtype=torch.float64, requires_grad=True)
    y = Dropout(0.2, 0, "ffn")(x, sequence())
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_the_type_stays():
    assert Dropout(0.2, 0, "ffn")(torch.ones(B, S, H, dtype=torch.bfloat16), sequence()).dtype == torch.bfloat16
