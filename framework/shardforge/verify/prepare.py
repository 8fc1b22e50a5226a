"""What is asked for becomes a small recipe and a list of cases that it can run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardforge.core.errors import ForgeError, LayoutError
from shardforge.core.layout import SHORT, Layout
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe.schema import Recipe
from shardforge.verify import cases
from shardforge.verify.cases import Case
from shardforge.verify.portable import portable
from shardforge.verify.shrink import check, placed, pooled, pools, shrink


@dataclass(frozen=True)
class Wanted:
    """What to verify: `layouts`, or with none of them all that the kinds allow, sampled, when `every` is set."""

    layouts: tuple[Layout, ...] = ()
    every: bool = False
    processes: int = 8
    steps: int = 2
    timeout_s: float = 120.0
    tamper: str = ""  # "module:function", called in every rank of a layout, never in the one process it is held against


def prepare(recipe: Recipe, wanted: Wanted) -> tuple[cases.Plan, Recipe, list[Case]]:
    """Layouts, the small recipe that fits them all, and the cases in the order in which they run."""
    if wanted.every:
        recipe, notes = portable(recipe)
        plain = dataclasses.replace(recipe, engine=type(recipe.engine)())  # its options are sampled
        axes = allowed_axes(plain)
        plan = cases.Plan(tuple(cases.every(axes, wanted.processes, recipe.parallel.order)), tuple(notes))
        if not plan.layouts:
            raise LayoutError(
                f"these kinds run on one process only, or --processes {wanted.processes} is too few", "--all"
            )
        small = dataclasses.replace(layered(plain, plan.layouts, plan.layouts), engine=recipe.engine)

        def allowed(case: Case) -> bool:
            return not refused(small, case, recipe.engine)

        listed = cases.sampled(plan.layouts, recipe.engine, small.train.sequences // pooled(small), allowed)
        return plan, small, listed
    asked = wanted.layouts or (recipe.parallel,)
    for layout in asked:
        engine = recipe.engine if layout == recipe.parallel else unstaged(recipe.engine)
        check(dataclasses.replace(recipe, parallel=layout, engine=engine))
    recipe, notes = portable(recipe)
    plans = [cases.covering(layout, wanted.processes) for layout in asked]
    layouts = tuple(dict.fromkeys(each for plan in plans for each in plan.layouts))
    plan = cases.Plan(layouts, tuple(dict.fromkeys([*(text for each in plans for text in each.unproved), *notes])))
    small = layered(recipe, layouts, asked)
    return plan, small, [as_recipe(recipe, small, layout) for layout in layouts]


def as_recipe(recipe: Recipe, small: Recipe, layout: Layout) -> Case:
    """A layout with the recipe's own options and about as many micro-batches."""
    share = max(1, recipe.train.sequences // recipe.parallel.data_ranks)
    pieces = share // (recipe.train.micro_batch or share)
    return Case(layout, (), cases.micro_batches(layout, pieces, pools(small, layout)))


def layered(recipe: Recipe, layouts: Sequence[Layout], full: Sequence[Layout]) -> Recipe:
    """The small recipe with a layer for each stage; with two for each rank where its schedule has as many stages."""
    deepest = max(layout.pp for layout in layouts)
    try:
        return shrink(recipe, layouts, full, max(deepest, 4) if deepest > 1 else 1)
    except LayoutError:
        if deepest == 1:
            raise
    return shrink(recipe, layouts, full, 2 * deepest)


def unstaged(engine: Any) -> Any:
    named = any(each.name == "stages" for each in dataclasses.fields(engine))
    return dataclasses.replace(engine, stages=None) if named else engine


def allowed_axes(recipe: Recipe) -> list[str]:
    """Axes over which the recipe's kinds work."""
    axes = []
    for axis in SHORT:
        layout = Layout(dp_shard=2, **{axis: 2}) if axis in ("ep", "etp") else Layout(**{axis: 2})
        try:
            small = layered(recipe, [layout], [layout])
        except ForgeError:
            continue
        names = {dim.name for item in declared(build(small.model, small.objective.build())) for dim in item.dims}
        if axis not in ("ep", "etp") or {"ep": "expert", "etp": "expert_ffn"}[axis] in names:
            axes.append(axis)
    return axes


def refused(small: Recipe, case: Case, engine: Any) -> str:
    """Why a case cannot be: empty where it can."""
    try:
        check(placed(small, case.layout, dataclasses.replace(engine, **dict(case.options)), case.micro_batches))
    except ForgeError as error:
        return str(error)
    return ""


def companion(case: Case, deep: Sequence[Case], small: Recipe) -> Case:
    """What resumes from the checkpoint of a case: the next of `deep`, else data ranks alone, else one process."""
    if len(deep) > 1:
        return deep[(list(deep).index(case) + 1) % len(deep)]
    flat = Layout(dp_shard=case.layout.world_size)
    rows = flat.data_ranks * pooled(small)
    if flat == case.layout or small.train.sequences % rows or refused(small, Case(flat), small.engine):
        return Case(Layout())
    return Case(flat)
