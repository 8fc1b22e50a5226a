"""Bytes of the ranks of a layout, from the step of one rank of each pipeline stage. See plan.rank for what is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from shardforge.core import units
from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout
from shardforge.engine import staged
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.parallel.stages import ORDERS, Stages
from shardforge.plan import fake
from shardforge.plan.rank import Rank, RankBytes, StageBytes, planned
from shardforge.plan.schedule import columns, even_costs, micro_batches_of
from shardforge.plan.simulate import Cost, simulate
from shardforge.recipe.schema import Recipe


def dry_run(recipe: Recipe, rank: int) -> RankBytes:
    """LayoutError for a rank that the layout does not have."""
    ranks = recipe.parallel.world_size
    if not 0 <= rank < ranks:
        raise LayoutError(f"the layout {recipe.parallel} has no rank {rank}", "--rank", f"0 to {ranks - 1}")
    with fake.world(ranks, rank) as mode:
        return Rank(recipe, mode).bytes(rank)


def stage_ranks(layout: Layout) -> list[int]:
    """One rank of each rank of the pipeline: that at the beginning of every other axis, whose pieces are largest."""
    placed = layout.placed()
    return [placed[stage * layout.stage_size] for stage in range(layout.pp)]


def stages_dry_run(recipe: Recipe, cut: Stages, tell: Callable[[str], None]) -> list[RankBytes]:
    """One rank of each rank of a pipeline; those with equal stages are run once."""
    seen: dict[tuple, RankBytes] = {}
    out = []
    for pp_rank, rank in enumerate(stage_ranks(recipe.parallel)):
        held = cut.held(pp_rank)
        same = tuple(_signature(recipe, cut, stage) for stage in held)
        if same not in seen:
            tell(f"running rank {rank}: stage{'s' * (len(held) > 1)} {' and '.join(map(str, held))}")
            seen[same] = dry_run(recipe, rank)
        out.append(dataclasses.replace(seen[same], rank=rank, held=held))
    return out


def stage_bytes(recipe: Recipe, cut: Stages, seen: dict[tuple, StageBytes]) -> list[StageBytes]:
    """Each stage of a cut, which need not be the recipe's. `seen` carries what is known to the next cut."""
    layout = dataclasses.replace(recipe.parallel, pp=cut.pp)
    recipe = dataclasses.replace(recipe, parallel=layout)
    names = [(*_signature(recipe, cut, stage), ORDERS[cut.schedule].split) for stage in range(len(cut))]
    for pp_rank, rank in enumerate(stage_ranks(layout)):
        held = cut.held(pp_rank)
        if any(names[stage] not in seen for stage in held):
            with fake.world(layout.world_size, rank) as mode:
                found = Rank(recipe, mode, cut).stages()
            seen |= {names[stage]: each for stage, each in zip(held, found, strict=True)}
    return [seen[name] for name in names]


def _signature(recipe: Recipe, cut: Stages, stage: int) -> tuple:
    """Equal for stages that keep the same."""
    span = cut.span(stage)
    return recipe.model.layers[span.start : span.stop], stage == 0, stage == len(cut) - 1


def report(recipe: Recipe, rank: int | None, tell: Callable[[str], None]) -> None:
    """The bytes of a rank, or of one rank of each pipeline stage, as a table."""
    model = build(recipe.model, recipe.objective.build())
    cut = staged.cut(recipe, planned(recipe.engine), model)
    if rank is None and cut is not None:
        found = stages_dry_run(recipe, cut, tell)
    else:
        found = [dry_run(recipe, rank or 0)]
    rows = [HEADING]
    for each in found:
        micro, held = held_of(recipe, cut, each)
        rows.append(
            (
                str(each.rank),
                " ".join(map(str, each.held)),
                str(each.layers),
                *map(units.bytes_, (each.weights, each.gradients, each.optimizer, each.between, each.one)),
                f"{micro:.4g} = {units.bytes_(held)}",
                units.bytes_(each.peak(held)),
            )
        )
    layout = recipe.parallel
    ranks = f"{layout.world_size:,} ranks as {layout}, {layout.stage_size:,} a stage"
    tell(f"{recipe.name}: {sum(item.count for item in declared(model)):,} weights on {ranks}")
    if len(found) == layout.pp:
        tell(f"the stages hold {sum(each.count for each in found):,}")
    tell("\n".join(["", *columns(rows), "", *LEGEND]))


HEADING = ("rank", "stages", "layers", "weights", "gradients", "optimizer", "gathered", "micro-batch", "held", "peak")
LEGEND = (
    "gathered     weights whole for compute and gradients not yet summed, between two micro-batches",
    "micro-batch  peak of one forward and backward pass, above weights and optimizer",
    "held         micro-batches whose activations the schedule keeps at one time",
    "peak         of a step: tensors only; add what the allocator and the communication library take",
)


def held_of(recipe: Recipe, cut: Stages | None, each: RankBytes) -> tuple[float, float]:
    """Micro-batches that a rank holds at most, and their bytes."""
    if cut is None:
        return 1.0, float(each.stages[0].kept)
    line = simulate(cut.schedule, cut.ranks, micro_batches_of(recipe), even_costs(cut, Cost()))
    rank, none = cut.ranks[each.held[0]], StageBytes(0, 0, 0, 0)
    mine = dict(zip(each.held, each.stages, strict=True))
    sizes = [mine.get(stage, none) for stage in range(len(cut))]
    count = line.peaks([1 / line.chunks] * len(cut))[rank]
    return count, line.peaks([size.kept for size in sizes], [size.halved for size in sizes])[rank]
