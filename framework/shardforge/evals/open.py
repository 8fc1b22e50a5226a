"""A trained run, opened on one process: model, tokenizer, recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from shardforge.checkpoint import folders
from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError, DataError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.data.corpus import Corpus
from shardforge.families.shardforge import BESIDE, TOKENIZER
from shardforge.model.build import build
from shardforge.precision.types import DTYPES
from shardforge.recipe.load import load
from shardforge.recipe.schema import Recipe


@dataclass(frozen=True)
class Trained:
    recipe: Recipe  # with the layout of one process
    model: nn.Module
    tokenizer: object  # tokenizers.Tokenizer
    eos: int
    step: int

    @cached_property
    def corpus(self) -> Corpus:
        """The first that it was trained on. DataError when it is not there."""
        return corpus_of(self.recipe)

    @property
    def tables(self) -> torch.dtype:
        """Type of position tables, as in training."""
        return torch.promote_types(DTYPES[self.recipe.precision.compute], torch.float32)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def open_trained(run_dir: RunDir, step: int | None = None) -> Trained:
    """The weights of a checkpoint (the newest by default), whatever layout wrote it, in the type that computes."""
    from tokenizers import Tokenizer

    if not run_dir.recipe.exists():
        raise DataError("this is not a run directory: it has no recipe.yaml", run_dir.path, "name a folder like runs/x")
    recipe = dataclasses.replace(load(run_dir.recipe).recipe, parallel=Layout())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build(recipe.model, recipe.objective.build(), DTYPES[recipe.precision.master])
    model.to_empty(device=device)
    store = Store(run_dir.checkpoints, recipe.checkpoint, describe={"model": table(model)})
    steps = store.committed()
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(
            f"no committed checkpoint of step {step}; there are {steps}" if steps else "no committed checkpoint yet",
            run_dir.checkpoints,
            f"choose from {steps}" if steps else "wait for the first one, or start the run",
        )
    chosen = steps[-1] if step is None else step
    store.load(chosen, collect(model))
    store.close()
    model.to(DTYPES[recipe.precision.compute])
    path, eos = tokenizer_of(run_dir, recipe, chosen)
    return Trained(recipe, model.eval(), Tokenizer.from_file(str(path)), eos, chosen)


def corpus_of(recipe: Recipe) -> Corpus:
    return Corpus.open(Path(recipe.data.sources[0].path))


def tokenizer_of(run_dir: RunDir, recipe: Recipe, step: int) -> tuple[Path, int]:
    """tokenizer.json and the token that ends a document: what a conversion brought along, else those of the corpus."""
    brought = run_dir.path / TOKENIZER / "tokenizer.json"
    if not brought.is_file():
        corpus = corpus_of(recipe)
        return corpus.tokenizer, corpus.manifest.tokenizer.eos
    extra = folders.read_manifest(run_dir.checkpoints / folders.name(step))["extra"]
    eos = extra.get(BESIDE, {}).get("tokens", {}).get("eos_token_id")
    return brought, int(eos[0] if isinstance(eos, list) else -1 if eos is None else eos)
