"""Rows of padding beside a batch change nothing: not the loss, not its terms, no gradient, no load."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.nn.batch import IGNORE, PADDING, Batch
from tests.equivalence.cases import together
from tests.equivalence.mixtures import CASES
from tests.tiny import LENGTH, assert_same, batch, part, tiny

POOLED = [{"scope": "sequence", "weight": 0.3, "sequences": 2}, {"scope": "batch", "weight": 0.2}]
MIXTURES: dict[str, dict[str, Any]] = {
    "pools-and-batch": {"ffn": {"kind": "moe", "experts": 8, "k": 2, "inner": 8, "balance": POOLED, "z_loss": 0.1}},
    **{name: CASES[name] for name in ("deepseek", "noisy")},
}


def blanked(given: Batch, kept: int) -> Batch:
    """With rows of padding from `kept` on."""
    labels, documents = given.labels.clone(), given.documents.clone()
    labels[kept:], documents[kept:] = IGNORE, PADDING
    return replace(given, labels=labels, documents=documents)


def one_step(layout: Layout, changes: dict[str, Any], rows: int, kept: int) -> dict[str, Tensor]:
    """Of the first `rows` rows of the tiny batch, those from `kept` on being padding."""
    recipe = tiny(layout=layout, **changes, train={"steps": 2, "sequences": rows, "seq_len": LENGTH})
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    whole = blanked(next(batch().split(rows)), kept)
    losses = engine.forward_backward(part(whole, engine.mesh.data_rank, layout.data_ranks), 0)
    out = {f"grad {name}": grad for name, grad in engine.gradients().items()}
    out |= {f"load {layer}": torch.tensor(each.load) for layer, each in losses.experts.items()}
    return together(out | {"loss": torch.tensor([losses.loss, *losses.terms.values()], dtype=torch.float64)})


@pytest.mark.parametrize("layout", ["one", "dp2", "cp2"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_rows_of_padding_change_nothing(ranks, mixture, layout):
    wanted = Layout.parse(layout)
    full = ranks(1).run(one_step, Layout(), MIXTURES[mixture], 4, 4)[0]
    padded = ranks(wanted.world_size).run(one_step, wanted, MIXTURES[mixture], 8, 4)[0]
    assert_same(padded, full)
