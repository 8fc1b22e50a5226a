"""A trained run whose optimizer counted the same steps for every weight, as formats with one count for all need it."""

from __future__ import annotations

from pathlib import Path

import torch

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import dump
from tests.tiny import mapping

STEP = 7


def save(path: Path) -> Path:
    """A run directory with one checkpoint of a tiny Llama."""
    numbers = {"master": "fp32", "compute": "fp32", "reduce": "fp32"}
    recipe = from_mapping(mapping(precision=numbers)).recipe
    model = build(recipe.model, recipe.objective.build(), torch.float32).to_empty(device="cpu")
    fill(model, 3)
    chance = torch.Generator().manual_seed(5)
    tensors = collect(model, recipe.optim.build(model))
    for name, tensor in tensors.items():
        if name.startswith("optim."):
            tensor.copy_(torch.rand(tensor.shape, generator=chance) + 1 if tensor.dim() else torch.tensor(STEP))
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(dump(recipe))
    store = Store(path / "checkpoints", recipe.checkpoint, describe={"model": table(model)})
    store.save(STEP, tensors, {}, wait=True)
    store.close()
    return path
