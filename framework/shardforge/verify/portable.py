"""What of a recipe cannot be verified in float64 on a CPU, and what stands in for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardforge.core.slots import cores
from shardforge.recipe.provenance import inline, plain
from shardforge.recipe.schema import CheckpointConfig, PrecisionConfig, Recipe

FP64 = PrecisionConfig(master="fp64", compute="fp64", reduce="fp64")

STAND_INS: dict[tuple[str, str], tuple[Any, Any]] = {
    ("engine", "compiled"): (True, False),  # the same operations, after minutes of compiling in every rank
    ("engine", "dispatch"): ("deepep", "auto"),
    ("engine", "stages"): (..., None),  # they count the layers of the large model
    ("optim", "states"): (..., "master"),
}
"""Field -> (the value that cannot be, ... for any; the one that is taken)."""


def portable(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as it can run here, and a sentence for each change that leaves something unproved."""
    notes: list[str] = []
    changes: dict[str, Any] = {"precision": FP64, "checkpoint": CheckpointConfig(every=0, asynchronous=False)}
    for section in ("engine", "optim"):
        changes[section] = _replaced(section, getattr(recipe, section), notes)
    auto = cores["auto"]()
    if recipe.model.core != auto:
        notes.append(f"model.core={inline(plain(recipe.model.core)['kind'])} is verified with auto")
    if recipe.precision != FP64:
        types = recipe.precision
        notes.append(f"rounding: {types.compute} compute, {types.master} weights and {types.reduce} sums run as fp64")
    changes["model"] = dataclasses.replace(recipe.model, core=auto)
    return dataclasses.replace(recipe, run_dir=None, observe=(), **changes), notes


def _replaced(section: str, config: Any, notes: list[str]) -> Any:
    changes = {}
    for field in dataclasses.fields(config):
        wrong, right = STAND_INS.get((section, field.name), (None, None))
        value = getattr(config, field.name)
        if wrong is not None and value != right and wrong in (..., value):
            changes[field.name] = right
            told = "cut by cost" if right is None else inline(right)
            notes.append(f"{section}.{field.name}={inline(value)} is verified as {told}")
    return dataclasses.replace(config, **changes)
