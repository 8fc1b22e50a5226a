"""A run of ours, or one of its checkpoints, as a source of weights and of what its optimizer kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.checkpoint import audit, folders, tensorfile
from shardforge.checkpoint.index import Entry
from shardforge.checkpoint.storage import stored
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.errors import CheckpointError
from shardforge.core.rundir import RunDir
from shardforge.families.kept import Kept, kept
from shardforge.families.source import Beside, Info, belonging, linked_away
from shardforge.recipe.load import load
from shardforge.recipe.provenance import plain

MODEL, OPTIM = "model.", "optim."
BESIDE, TOKENIZER = "beside", "tokenizer"
"""What a conversion adds: in `extra` of the manifest special tokens and length, and a folder of a run directory."""


def step_folder(path: Path) -> Path | None:
    """The step folder that `path` is, or the newest committed one of the run directory or the folder of checkpoints
    that it is; None when it is none of these. CheckpointError for a run that has committed nothing."""
    if (path / folders.MARKER).is_file() or (path / folders.MANIFEST).is_file():
        return path
    run = RunDir(path)
    for root in (run.checkpoints, path):
        if steps := folders.committed(root):
            return root / folders.name(steps[-1])
    if run.checkpoints.is_dir() or (run.recipe.is_file() and run.provenance.is_file()):
        raise CheckpointError("this run has no committed checkpoint", path, "wait for its first one")
    return None


class RunSource:
    """See `families.source.Source`. `folder` is a committed step folder; the model stands in the recipe of its run."""

    def __init__(self, folder: Path):
        self.path = folder
        manifest, self._entries = audit.opened(folder)
        self.step = int(manifest["step"])
        recipe = plain(load(recipe_of(folder)).recipe)
        self.model: dict[str, Any] = recipe["model"]
        self.beside = _beside(folder, self.step, recipe, manifest.get("extra") or {})
        self.names = {name: _info(entry) for name, entry in self._part(MODEL)}
        self._kept = _kept(self.names, dict(self._part(OPTIM)))
        self.moments, self.counts = self._kept.moments, self._kept.counts
        self.beside = replace(self.beside, unread=(*self.beside.unread, *self._kept.unread))

    def read(self, name: str) -> Tensor:
        return self._read(MODEL + name)

    def read_moment(self, kind: str, name: str) -> Tensor:
        """Problems where the checkpoint lacks some of what the optimizer kept."""
        self._kept.check(self.path)
        return self._read(f"{OPTIM}{name}.{kind}")

    def _part(self, prefix: str) -> Iterator[tuple[str, Entry]]:
        for name, entry in self._entries.items():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), entry

    def boxes(self, name: str, kind: str = "") -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """The pieces that a weight was saved in: where each begins, and its numbers, which no one may change. With
        `kind` those of what the optimizer keeps for it.

        A piece is mapped from its file while the iteration is there; only what is read of it costs anything.
        """
        if kind:
            self._kept.check(self.path)
        yield from self._boxes(self._entries[f"{OPTIM}{name}.{kind}" if kind else MODEL + name])

    def _boxes(self, entry: Entry) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        for chunk in entry.chunks:
            path = self.path / chunk.file
            with tensorfile.opened(path) as file:
                yield chunk.offsets, stored(file, chunk, entry.dtype, path)

    def _read(self, name: str) -> Tensor:
        entry = self._entries[name]
        if len(entry.chunks) == 1:
            return next(self._boxes(entry))[1]
        whole = torch.empty(entry.shape, dtype=TYPES[entry.dtype][0])
        for offsets, numbers in self._boxes(entry):
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, numbers.shape, strict=True))] = numbers
        return whole


def recipe_of(folder: Path) -> Path:
    """The recipe of the run that a step folder belongs to. CheckpointError when the folder was taken out of its run."""
    for place in (folder.resolve().parent.parent, folder):
        if RunDir(place).recipe.is_file():
            return RunDir(place).recipe
    raise CheckpointError(
        "no recipe.yaml says what model this is a checkpoint of",
        folder,
        "name the folder inside its run directory, or put a copy of the run's recipe.yaml into it",
    )


def tokenizer_of(recipe: Mapping[str, Any]) -> tuple[Path, ...]:
    """The tokenizer.json that a recipe builds its corpus with, and what lies beside it; () where it names none."""
    build = (recipe.get("data") or {}).get("build") or {}
    named = (build.get("tokenizer") or {}).get("path")
    return belonging(Path(named).parent) if named and Path(named).is_file() else ()


def _beside(folder: Path, step: int, recipe: dict[str, Any], extra: Mapping[str, Any]) -> Beside:
    """Weights that a conversion brought have no run behind them: neither step nor data, and another's tokenizer."""
    brought = extra.get(BESIDE) or {}
    rest = {key: value for key, value in extra.items() if key != BESIDE}
    alone, mine = bool(brought) and not rest, recipe_of(folder).parent / TOKENIZER
    return Beside(
        step=(step or None) if alone else step,
        recipe=None if alone else recipe,
        extra=None if alone else rest,
        length=brought.get("length") if brought else (recipe.get("train") or {}).get("seq_len"),
        tokens=brought.get("tokens") or {},
        architecture=brought.get("architecture"),
        tokenizer=belonging(mine) or tokenizer_of(recipe),
        unread=linked_away(mine),
    )


def _info(entry: Entry) -> Info:
    return Info(entry.shape, entry.dtype)


def _kept(names: dict[str, Info], optim: dict[str, Entry]) -> Kept:
    kinds: dict[str, dict[str, tuple[int, ...]]] = {}
    for full, entry in optim.items():
        name, _, kind = full.rpartition(".")
        kinds.setdefault(kind, {})[name] = entry.shape
    return kept({name: info.shape for name, info in names.items()}, kinds)
