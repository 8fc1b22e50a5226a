"""Whether a layout and an engine can take a model, before any rank starts."""

from __future__ import annotations

from torch import nn

from shardforge.core.errors import LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe.schema import Recipe


def check_fit(model: nn.Module, layout: Layout) -> None:
    """Every dimension that the layout cannot split, each once, with the first weight that has it."""
    problems: dict[str, LayoutError] = {}
    for item in declared(model):
        try:
            layout.split(item.dims)
        except LayoutError as error:
            told = LayoutError(f"{error.what} (first in {item.fqn})", error.where, error.fix)
            problems.setdefault(error.what, told)
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise Problems(problems.values(), f"the layout {layout}")


def check_recipe(recipe: Recipe) -> None:
    """The same for a recipe, and what its engine asks of it; the model is built on the meta device, without memory."""
    model = build(recipe.model, recipe.objective.build())
    check_fit(model, recipe.parallel)
    recipe.engine.check(recipe, model)
