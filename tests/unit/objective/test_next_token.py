from __future__ import annotations

import math

import pytest
import torch

from shardforge.nn.batch import IGNORE
from shardforge.nn.head import Head
from shardforge.objective.kinds.next_token import NextTokenConfig


class Even(Head):
    """Every one of eight tokens is as likely as any other."""

    def operand(self) -> torch.Tensor:
        return torch.zeros(8, 4, dtype=torch.float64)


X = torch.ones(1, 3, 4, dtype=torch.float64)
LABELS = torch.tensor([[5, IGNORE, 0]])


def test_the_loss_is_summed_over_the_scored_positions():
    out = NextTokenConfig().build()(X, Even(), LABELS)
    assert out.keys() == {"total", "loss"}
    torch.testing.assert_close(out["loss"].item(), 2 * math.log(8))


def test_the_z_term_is_reported_with_its_weight_and_is_in_the_total_only():
    out = NextTokenConfig(z_loss=0.5).build()(X, Even(), LABELS)
    torch.testing.assert_close(out["z_loss"].item(), 0.5 * 2 * math.log(8) ** 2)
    torch.testing.assert_close(out["loss"].item(), 2 * math.log(8))
    torch.testing.assert_close(out["total"], out["loss"] + out["z_loss"])


@pytest.mark.parametrize("z_loss", [0.0, 0.5])
def test_an_objective_knows_what_it_reports_before_it_runs(z_loss):
    made = NextTokenConfig(z_loss=z_loss).build()
    assert {"total", *made.terms} == made(X, Even(), LABELS).keys()
