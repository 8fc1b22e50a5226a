"""Weights that a new run begins with instead of random ones: from another run, or from another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.checkpoint import folders, state, tensorfile
from shardforge.core.errors import CheckpointError, ForgeError, Problems, RecipeError
from shardforge.core.log import logger, rank
from shardforge.core.rundir import RunDir
from shardforge.engine.base import Engine
from shardforge.families.open import open_source
from shardforge.families.pieces import fill
from shardforge.families.section import apart, whole
from shardforge.families.shardforge import RunSource
from shardforge.families.source import Source
from shardforge.families.turned import Turned, turned
from shardforge.model.build import build
from shardforge.recipe.model import ModelConfig
from shardforge.recipe.provenance import plain
from shardforge.recipe.schema import Recipe

log = logger("train")

FIELD = "train.start"
MOMENTS = f"{FIELD}_moments"
PREFIX, STATE = "model.", "optim."
DROPPED = f"{MOMENTS}: dropped begins with a fresh optimizer"


def find(recipe: Recipe, run_dir: RunDir) -> Source | None:
    """What a run begins with; None for one that begins at random, or has a checkpoint of its own to go on from.

    RecipeError or Problems, before anything is built, when the weights are not all of this model, with both shapes.
    """
    carried = recipe.train.start_moments == "carried"
    if recipe.train.start is None and carried:
        raise RecipeError(f"{MOMENTS}: there is nothing to carry", fix="name a ShardForge run in train.start")
    if recipe.train.start is None or folders.committed(run_dir.checkpoints):
        return None
    try:
        source = turned(open_source(Path(recipe.train.start)), plain(recipe.model))
    except CheckpointError as error:
        raise RecipeError(f"{FIELD}: {error.what}", error.where, error.fix) from error
    problems = unlike(source, state.table(build(recipe.model, recipe.objective.build())))
    if problems:
        fix = "train the model that these weights are of, or leave train.start empty"
        raise Problems([*problems, RecipeError("these are not the weights of this model", source.path, fix)], FIELD)
    if carried and not source.moments:
        raise RecipeError(f"{MOMENTS}: there is no optimizer state, only weights", source.path, DROPPED)
    return source


def unlike(source: Source, table: Mapping[str, Mapping[str, Any]]) -> list[ForgeError]:
    """A line for each weight that is missing, not of this model, or of another shape.

    What modules remember besides weights (it has no dims) may be missing: it stays as a new run has it.
    """
    found = {name: info.shape for name, info in source.names.items()}
    wanted = {name: tuple(each["shape"]) for name, each in table.items() if each["dims"] or name in found}

    def told(shape: tuple[int, ...] | None) -> str:
        return "absent" if shape is None else str(list(shape))

    return [
        CheckpointError(f"{name}: {told(found.get(name))} there, {told(wanted.get(name))} here")
        for name in [*wanted, *(found.keys() - wanted.keys())]
        if found.get(name) != wanted.get(name)
    ]


def begin(source: Source, recipe: Recipe, engine: Engine) -> None:
    """Fill the weights of an engine, on each rank the part that it has, and what its optimizer keeps if it is carried.

    CheckpointError, before anything is filled, for a source whose optimizer kept something else.
    """
    carried = recipe.train.start_moments == "carried"

    def read(tensors: dict[str, Tensor]) -> None:
        if carried:
            _same_states(source, tensors)
        for name, target in tensors.items():
            weight = name.removeprefix(PREFIX)
            if weight != name and weight in source.names:
                fill(source, weight, target)
            elif carried and name.startswith(STATE):
                weight, _, kind = name.removeprefix(STATE).rpartition(".")
                fill(source, weight, target, kind)

    for line in meanings(source.model, recipe.model) if rank() == 0 else ():
        log.warning("%s: %s", FIELD, line)
    engine.load(read)
    log.info("step 0 begins with the weights%s in %s", " and the optimizer's moments" if carried else "", source.path)


def _same_states(source: Source, tensors: Mapping[str, Tensor]) -> None:
    here = {name.rpartition(".")[2] for name in tensors if name.startswith(STATE)}
    there = {*source.moments, *source.counts}
    if here != there:
        kept, wanted = (", ".join(sorted(kinds)) for kinds in (there, here))
        what = f"{MOMENTS}: the optimizer kept {kept} there, this one keeps {wanted}"
        raise CheckpointError(what, source.path, f"{DROPPED}; or train with the optimizer of the source")


def identity(source: Source) -> dict[str, Any]:
    """What provenance says of a source: where it is, and of a checkpoint of ours its step and the manifest's hash."""
    told: dict[str, Any] = {"path": str(source.path.resolve())}
    here = source.of if isinstance(source, Turned) else source
    if isinstance(here, RunSource):
        told |= {"step": here.step, "manifest": tensorfile.sha256(here.path / folders.MANIFEST)}
    return told


def meanings(there: Mapping[str, Any], here: ModelConfig) -> list[str]:
    """Fields that give the same shapes another meaning, such as the base of positions: once for all layers."""
    changes = apart(whole(there, FIELD), plain(here))
    return [f"{field}: {old!r} there, {new!r} here" for field, old, new in changes]
