from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shardforge.core.dims import Dim
from shardforge.nn.init import fill, normal
from shardforge.nn.linear import Linear, Table

ROWS, WIDTH = Dim("vocab", 12), Dim("hidden", 3)


def linear(bias: bool) -> Linear:
    made = Linear(Dim("hidden", 5), Dim("ffn", 7), normal(1.0), bias).double()
    fill(made, 1)
    if bias:
        torch.nn.init.normal_(made.bias, generator=torch.Generator().manual_seed(0))
    return made


def table(rows: Dim = ROWS) -> Table:
    made = Table(rows, WIDTH, normal(1.0)).double()
    fill(made, 1)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_plus_the_bias(bias):
    made, x = linear(bias), torch.ones(2, 3, 5, dtype=torch.float64)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias if bias else None))


def test_partial_sums_over_ranks_add_the_bias_once():
    made, x = linear(True), torch.ones(4, 5, dtype=torch.float64)
    parts = []
    for rank, columns in enumerate((slice(0, 2), slice(2, 5))):
        made.once = 1.0 if rank == 0 else 0.0
        kept, made.weight = made.weight, torch.nn.Parameter(made.weight[:, columns].detach())
        parts.append(made(x[:, columns]))
        made.weight = kept
    torch.testing.assert_close(sum(parts), F.linear(x, made.weight, made.bias), rtol=1e-12, atol=1e-12)


def test_biases_start_at_zero_and_are_not_there_unless_asked_for():
    made = Linear(Dim("hidden", 5), Dim("ffn", 7), normal(1.0), bias=True)
    fill(made, 1)
    assert made.bias.tolist() == [0.0] * 7
    assert "bias" not in dict(Linear(Dim("hidden", 5), Dim("ffn", 7), normal(1.0)).named_parameters())


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_tables_of_some_rows_each_add_up_to_the_whole_table(parts):
    whole, index = table(), torch.arange(12).reshape(3, 4)
    total = torch.zeros(3, 4, 3, dtype=torch.float64)
    for part, rows in enumerate(whole.weight.detach().chunk(parts)):
        piece = table()
        piece.weight, piece.first = torch.nn.Parameter(rows), part * (12 // parts)
        total += piece(index)
    assert torch.equal(total, whole(index))
