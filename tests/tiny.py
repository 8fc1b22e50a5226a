"""Tiny recipes and batches for tests, in float64, and the one place where tolerances stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.nn.batch import IGNORE, Batch
from shardforge.recipe.load import from_mapping
from shardforge.recipe.schema import Recipe

RTOL = 1e-10  # of the norm of the expected tensor, in float64
VOCAB, HIDDEN, LENGTH, SEQUENCES = 32, 16, 16, 8

GQA = {"kind": "gqa", "heads": 4, "kv_heads": 4, "head_dim": 4}
GLU = {"kind": "glu", "inner": 24}


def mapping(**changes: Any) -> dict[str, Any]:
    """A tiny recipe as plain data; `changes` replace sections, or parts of the one kind of block by slot name."""
    block = {"mixer": GQA, "ffn": GLU, "residual": {"kind": "pre"}}
    block |= {slot: changes.pop(slot) for slot in ("mixer", "ffn", "residual") if slot in changes}
    model = {
        "vocab": VOCAB,
        "hidden": HIDDEN,
        "blocks": {"one": block},
        "stack": ["one x 2"],
        "init": {"std": 0.3},
    }
    model |= changes.pop("model", {})
    base = {
        "name": "tiny",
        "seed": 1,
        "model": model,
        "data": {"sources": [{"path": "nowhere"}]},
        "schedule": {"kind": "constant", "lr": 0.01},
        "precision": {"master": "fp64", "compute": "fp64", "reduce": "fp64"},
        "train": {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH},
    }
    return base | changes


def tiny(*, layout: Layout | None = None, **changes: Any) -> Recipe:
    recipe = mapping(**changes)
    if layout is not None:
        recipe["parallel"] = layout.degrees() | {"order": layout.order}
    return from_mapping(recipe).recipe


def batch(step: int = 0) -> Batch:
    """A whole batch of packed documents of uneven lengths, with uneven numbers of ignored labels in each row."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (SEQUENCES, LENGTH)
    tokens = torch.randint(0, VOCAB, shape, generator=generator)
    labels = torch.randint(0, VOCAB, shape, generator=generator)
    documents, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row in range(SEQUENCES):
        cut = 3 + row % 9
        documents[row, cut:] = 1
        positions[row] = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
        labels[row, : row % 4] = IGNORE
    return Batch(tokens, labels, positions, documents, torch.arange(SEQUENCES))


def part(whole: Batch, rank: int, ranks: int) -> Batch:
    """The rows of one data rank."""
    share = len(whole) // ranks
    return list(whole.split(share))[rank]


def assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float | None = None) -> None:
    """Every tensor equal within rtol of its norm; the message lists all that are not, worst first.

    Without rtol, those in float64 within RTOL and all others exactly: counts, and what modules remember of them.
    """
    assert got.keys() == expected.keys(), sorted(got.keys() ^ expected.keys())
    wrong = []
    for name, want in expected.items():
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {tuple(have.shape)}, expected {tuple(want.shape)}"
        size = want.double().norm().clamp(min=1e-30)
        error = ((have.double() - want.double()).norm() / size).item()
        limit = rtol if rtol is not None else RTOL if want.dtype == torch.float64 else 0.0
        if not error <= limit:
            wrong.append((error, name))
    assert not wrong, "\n".join(f"{name}: relative error {error:.1e}" for error, name in sorted(wrong, reverse=True))
