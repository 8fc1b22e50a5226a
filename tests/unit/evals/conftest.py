from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.core.rundir import RunDir
from shardforge.data import synthetic
from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.precision.types import DTYPES
from shardforge.recipe.provenance import dump
from shardforge.recipe.schema import CheckpointConfig, Recipe
from tests.tiny import LENGTH, SEQUENCES, VOCAB, tiny

WORDS = {"<end>": 0} | {f"w{number}": number for number in range(1, VOCAB)}
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "<end>"},
}


def model_of(recipe: Recipe, seed: int) -> nn.Module:
    model = build(recipe.model, recipe.objective.build(), DTYPES[recipe.precision.master]).to_empty(device="cpu")
    fill(model, seed)
    return model


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunDir, Recipe]]:
    """trained(steps=(1, 5)): a run directory whose checkpoint of step n holds the weights that seed n gives."""
    monkeypatch.setattr(synthetic, "TOKENIZER", json.dumps(TOKENIZER).encode())
    synthetic.markov(tmp_path / "corpus", vocab=VOCAB, documents=40, tokens=30)

    def make(steps: tuple[int, ...] = (1,), **changes: Any) -> tuple[RunDir, Recipe]:
        recipe = tiny(
            data={"sources": [{"path": str(tmp_path / "corpus")}]},
            train={"steps": 9, "sequences": SEQUENCES, "seq_len": LENGTH},
            **changes,
        )
        run_dir = RunDir(tmp_path / "run")
        run_dir.path.mkdir()
        run_dir.recipe.write_text(dump(recipe))
        for step in steps:
            model = model_of(recipe, step)
            store = Store(run_dir.checkpoints, CheckpointConfig(keep_last=9), describe={"model": table(model)})
            store.save(step, collect(model), {}, wait=True)
            store.close()
        return run_dir, recipe

    return make
