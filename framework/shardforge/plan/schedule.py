"""A recipe under pipeline schedules: who waits how long, and what each rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardforge.core import units
from shardforge.core.errors import LayoutError
from shardforge.engine import staged
from shardforge.model.build import build
from shardforge.parallel.stages import Stages, Work, cut
from shardforge.plan.formula import bubble_formula
from shardforge.plan.rank import StageBytes
from shardforge.plan.simulate import Cost, Timeline, simulate
from shardforge.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """One schedule of one recipe."""

    timeline: Timeline
    stages: Stages
    formula: float | None  # bubble of even stages, as published
    sizes: tuple[StageBytes, ...] | None = None

    def held(self) -> tuple[float, ...]:
        """Most micro-batches that each rank holds; 1 is a micro-batch in all stages of a rank."""
        return self.timeline.peaks([1 / self.timeline.chunks] * len(self.stages))

    def held_bytes(self) -> tuple[float, ...] | None:
        """The same in bytes; in a split backward pass with the gradients between its halves."""
        if self.sizes is None:
            return None
        return self.timeline.peaks([size.kept for size in self.sizes], [size.halved for size in self.sizes])

    def labels(self) -> list[str]:
        """What each rank holds, for people."""
        sizes = self.held_bytes()
        counts = [f"{count:.4g}" for count in self.held()]
        if sizes is None:
            return [f"{count} micro-batches" for count in counts]
        return [f"{count} = {units.bytes_(size)}" for count, size in zip(counts, sizes, strict=True)]


def stages_of(recipe: Recipe, schedule: str, pp: int) -> Stages:
    """The cut of the recipe's layers under a schedule: the recipe's own line where it is for this one, or balanced."""
    if pp < 2:
        raise LayoutError("one rank needs no schedule: parallel.pp is 1", "--pp", "--pp 4, to see four stages")
    own = (recipe.engine.schedule, recipe.parallel.pp) == (schedule, pp)
    return cut(schedule, pp, recipe.engine.stages if own else None, work_of(recipe))


def work_of(recipe: Recipe) -> Work:
    """FLOP of a forward pass over one sequence, part by part."""
    return staged.work(build(recipe.model, recipe.objective.build()), recipe.train.seq_len)


def even_costs(stages: Stages, cost: Cost) -> list[Cost]:
    """`cost`, of one micro-batch on a mean rank, shared over the stages as their FLOP are."""
    total = sum(stages.cost(stage) for stage in range(len(stages)))
    return [cost * (stages.cost(stage) * stages.pp / total) for stage in range(len(stages))]


def plan(
    stages: Stages,
    micro_batches: int,
    costs: Sequence[Cost],
    sizes: Sequence[StageBytes] | None = None,
    latency: float = 0.0,
) -> Plan:
    """LayoutError for a number of micro-batches that the schedule cannot run."""
    timeline = simulate(stages.schedule, stages.ranks, micro_batches, costs, latency)
    mean = _mean(costs)
    formula = bubble_formula(stages.schedule, stages.pp, micro_batches, timeline.chunks, mean)
    return Plan(timeline, stages, formula, None if sizes is None else tuple(sizes))


def micro_batches_of(recipe: Recipe, given: int | None = None) -> int:
    """Micro-batches of a step, each of a data rank's share."""
    share = recipe.train.sequences // recipe.parallel.data_ranks
    return given or share // (recipe.train.micro_batch or share)


def table(plans: Sequence[Plan]) -> list[str]:
    """Schedules side by side; times are of the fastest."""
    fastest = min(each.timeline.time for each in plans)
    rows = [("schedule", "stages", "micro-batches", "time", "bubble", "even stages", "most held", "bytes")]
    for each in plans:
        line, sizes = each.timeline, each.held_bytes()
        rows.append(
            (
                line.schedule,
                f"{len(line.stages)}",
                f"{line.micro_batches}",
                f"{line.time / fastest:.3f}",
                f"{line.bubble:.1%}",
                "-" if each.formula is None else f"{each.formula:.1%}",
                f"{max(each.held()):.4g}",
                "-" if sizes is None else units.bytes_(max(sizes)),
            )
        )
    note = "even stages: the published bubble for stages of equal work; most held: micro-batches on the fullest rank"
    return [*columns(rows), note]


def per_rank(each: Plan) -> list[str]:
    """What each rank waits and holds, one line a rank."""
    rows = [("rank", "stages", "layers", "waits", "holds")]
    for rank, (bubble, held) in enumerate(zip(each.timeline.bubbles, each.labels(), strict=True)):
        mine = each.stages.held(rank)
        layers = sum(each.stages.layers[stage] for stage in mine)
        rows.append((str(rank), " ".join(map(str, mine)), str(layers), f"{bubble:.1%}", held))
    return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length, the first a heading, as lines with aligned columns; the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _mean(costs: Sequence[Cost]) -> Cost:
    n = len(costs)
    return Cost(
        sum(cost.forward for cost in costs) / n,
        sum(cost.input_grad for cost in costs) / n,
        sum(cost.weight_grad for cost in costs) / n,
    )
