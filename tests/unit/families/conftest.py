from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.core.rundir import RunDir
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.recipe.provenance import dump
from shardforge.recipe.schema import CheckpointConfig, Recipe
from tests.tiny import tiny


def model_of(recipe: Recipe, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build(recipe.model, recipe.objective.build(), dtype).to_empty(device="cpu")
    fill(model, seed)
    return model


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., tuple[RunDir, dict[str, torch.Tensor]]]:
    """run_of(steps=(1, 5)): a run directory whose step n holds the weights that seed n gives, and the last of them."""

    def make(steps: tuple[int, ...] = (1,), optimizer: bool = False, **changes: Any):
        recipe = tiny(**changes)
        run = RunDir(tmp_path / "run")
        run.path.mkdir()
        run.recipe.write_text(dump(recipe))
        model = model_of(recipe, 0)
        for step in steps:
            model = model_of(recipe, step)
            store = Store(run.checkpoints, CheckpointConfig(keep_last=9), describe={"model": table(model)})
            built = recipe.optim.build(model) if optimizer else None
            store.save(step, collect(model, built), {}, wait=True)
            store.close()
        return run, {name: weight.detach().clone() for name, weight in model.named_parameters()}

    return make
