"""Which rank of a pipeline holds which layers: what each schedule asks for, a one-line language, and the cheapest cut.

    3 | 4 x 6 | 3     layers of each stage in order: 3 in the first, 4 in each of the next six, 3 in the last

The embedding belongs to the first stage; the norm before the head, the head and the objective to the last. Both count
as work, so the ends usually get fewer layers. No torch here: the planner reads these too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from shardforge.core.errors import LayoutError

WHERE = "engine.stages"


@dataclass(frozen=True)
class Order:
    """What a schedule asks of stages and micro-batches, and how its backward pass runs."""

    runner: str  # class of torch.distributed.pipelining.schedules
    stages: int = 1  # stages of a rank, unless a line of stages says more
    several: bool = False  # a rank may have any number of stages; micro-batches come in rounds of about pp
    mirrored: bool = False  # rank r has stages r and 2 pp - 1 - r, not r, r + pp, ...
    split: bool = False  # the backward pass runs in two halves: gradients of inputs, later those of weights
    fewest: int = 0  # micro-batches, times pp


ORDERS: Mapping[str, Order] = {
    "gpipe": Order("ScheduleGPipe"),  # Huang et al. 2018, arXiv:1811.06965
    "1f1b": Order("Schedule1F1B", fewest=1),  # Narayanan et al. 2020, arXiv:2006.09503, section 2.2
    "interleaved": Order("ScheduleInterleaved1F1B", 2, several=True),  # Narayanan et al. 2021, arXiv:2104.04473
    "zero_bubble": Order("ScheduleInterleavedZeroBubble", 2, several=True, split=True),  # Qi 2023, arXiv:2401.10241
    "zbv": Order("ScheduleZBVZeroBubble", 2, mirrored=True, split=True),  # the same, section 6
    "dualpipev": Order("ScheduleDualPipeV", 2, mirrored=True, split=True, fewest=2),  # arXiv:2412.19437, folded
}


@dataclass(frozen=True)
class Work:
    """FLOP of a forward pass: of what stands before the first block, of each block, and of what follows the last."""

    first: float
    blocks: tuple[float, ...]
    last: float

    def of(self, start: int, stop: int, *, first: bool, last: bool) -> float:
        """Of the blocks start ... stop - 1 and the ends that stand with them."""
        return sum(self.blocks[start:stop]) + first * self.first + last * self.last


@dataclass(frozen=True)
class Stages:
    """A cut of the layers of a model over the ranks of a pipeline."""

    schedule: str
    pp: int
    layers: tuple[int, ...]  # of each stage, in order
    work: Work

    def __len__(self) -> int:
        return len(self.layers)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """The pipeline rank of each stage."""
        if ORDERS[self.schedule].mirrored:
            return tuple(min(stage, 2 * self.pp - 1 - stage) for stage in range(len(self)))
        return tuple(stage % self.pp for stage in range(len(self)))

    def held(self, rank: int) -> tuple[int, ...]:
        """Stages of a pipeline rank, ascending."""
        return tuple(stage for stage, holder in enumerate(self.ranks) if holder == rank)

    def span(self, stage: int) -> range:
        """Layers of a stage."""
        start = sum(self.layers[:stage])
        return range(start, start + self.layers[stage])

    def cost(self, stage: int) -> float:
        """FLOP of one forward pass of a stage over one sequence."""
        span = self.span(stage)
        return self.work.of(span.start, span.stop, first=stage == 0, last=stage == len(self) - 1)

    def table(self) -> str:
        """Stage, rank, layers and share of the work, a line each; the last line says what balance costs."""
        costs = [self.cost(stage) for stage in range(len(self))]
        total, mean = sum(costs), sum(costs) / len(self)
        rows = [("stage", "rank", "layers", "work")]
        for stage, cost in enumerate(costs):
            span = self.span(stage)
            held = [f"{span.start}-{span.stop - 1}" if len(span) > 1 else str(span.start)] if span else []
            held = ["embedding"] * (stage == 0) + held + ["head"] * (stage == len(self) - 1)
            rows.append((str(stage), str(self.ranks[stage]), ", ".join(held), f"{100 * cost / total:.1f} %"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
        return "\n".join([*lines, f"{write(self.layers)}: the largest stage is {max(costs) / mean:.2f} of the mean"])


def cut(schedule: str, pp: int, text: str | None, work: Work) -> Stages:
    """The stages that `text` describes, or without it those whose largest one costs least. LayoutError: see `read`."""
    layers, order = len(work.blocks), ORDERS[schedule]
    usual = order.stages * pp
    if text is None:
        if usual > layers:
            raise LayoutError(f"{schedule} over pp={pp} makes {usual} stages of {layers} layers", WHERE, _fewer(layers))
        return Stages(schedule, pp, balance(work, usual), work)
    counts = read(text)
    fits = len(counts) % pp == 0 if order.several else len(counts) == usual
    stages = usual if not fits else len(counts)
    works = f"write {write(balance(work, stages))!r}" if stages <= layers else _fewer(layers)
    if not fits:
        wanted = f"a multiple of {pp}" if order.several else str(usual)
        what = f"the number of stages in {text!r} is {len(counts)}, {schedule} over pp={pp} needs {wanted}"
        raise LayoutError(what, WHERE, works)
    if sum(counts) != layers:
        raise LayoutError(f"the layers in {text!r} add up to {sum(counts)}, the model has {layers}", WHERE, works)
    if empty := [stage for stage, count in enumerate(counts[1:-1], 1) if count == 0]:
        what = f"{text!r} leaves stage {empty[0]} of {len(counts)} without a layer; only the two ends may have none"
        raise LayoutError(what, WHERE, works)
    return Stages(schedule, pp, counts, work)


def read(text: str) -> tuple[int, ...]:
    """ "3 | 4 x 6 | 3" -> (3, 4, 4, 4, 4, 4, 4, 3); LayoutError when a part is neither a count nor count x times."""
    out: list[int] = []
    for part in text.split("|"):
        count, cross, times = (word.strip() for word in part.partition("x"))
        if not count.isdecimal() or (cross and not (times.isdecimal() and int(times) > 0)):
            what = f"cannot read {part.strip()!r} in {text!r}"
            raise LayoutError(what, WHERE, "write layers of each stage like '3 | 4 x 6 | 3': six stages of 4 inside")
        out += [int(count)] * (int(times) if cross else 1)
    return tuple(out)


def write(layers: Sequence[int]) -> str:
    """The shortest line that `read` turns into `layers`."""
    runs: list[list[int]] = []
    for count in layers:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return " | ".join(f"{count} x {times}" if times > 1 else str(count) for count, times in runs)


def balance(work: Work, stages: int) -> tuple[int, ...]:
    """Layers of each stage such that the largest stage costs least, and among those cuts the most even one.

    Exact, by dynamic programming over (stages so far, layers so far), twice: the smallest possible maximum, then the
    smallest sum of squares below it. The first and the last stage may stay without a layer, the others may not.
    """
    layers = len(work.blocks)
    sums = [0.0]
    for block in work.blocks:
        sums.append(sums[-1] + block)

    def cost(stage: int, start: int, stop: int) -> float:
        ends = (stage == 0) * work.first + (stage == stages - 1) * work.last
        return sums[stop] - sums[start] + ends

    def starts(stage: int, stop: int) -> range:
        if stage == 0:
            return range(1)
        return range(stop + 1 if stage == stages - 1 else stop)

    def best(weigh: Callable[[float], float], join: Callable[[float, float], float]) -> list[list[tuple[float, int]]]:
        """[stage][layers so far] -> (what the stages so far cost at best, first layer of the last of them)."""
        table = [[(weigh(cost(0, 0, stop)), 0) for stop in range(layers + 1)]]
        for stage in range(1, stages):
            before, row = table[-1], []
            for stop in range(layers + 1):
                cuts = (
                    (join(before[start][0], weigh(cost(stage, start, stop))), start) for start in starts(stage, stop)
                )
                row.append(min(cuts, default=(math.inf, 0)))
            table.append(row)
        return table

    limit = best(lambda value: value, max)[-1][layers][0] * (1 + 1e-9)
    table = best(lambda value: value * value if value <= limit else math.inf, lambda a, b: a + b)
    out, stop = [], layers
    for stage in reversed(range(stages)):
        start = table[stage][stop][1]
        out.append(stop - start)
        stop = start
    return tuple(reversed(out))


def check_micro_batches(schedule: str, pp: int, count: int, share: int) -> None:
    """LayoutError when `schedule` cannot run `count` micro-batches of the `share` sequences of a data rank."""
    if accepts(schedule, pp, count):
        return
    what = f"{schedule} over pp={pp} cannot run {count} micro-batches: it needs {_needs(schedule, pp)}"
    sizes = [size for size in range(1, share + 1) if share % size == 0 and accepts(schedule, pp, share // size)]
    if sizes:
        size = max((size for size in sizes if share // size >= count), default=min(sizes))
        fix = f"micro_batch: {size} makes {share // size} of the {share} sequences of a data rank"
    else:
        fix = f"more sequences: a data rank has {share}; or a smaller pp"
    raise LayoutError(what, "train.micro_batch", fix)


def accepts(schedule: str, pp: int, count: int) -> bool:
    """Whether a schedule can run this number of micro-batches."""
    order = ORDERS[schedule]
    if order.several:
        return count % max(1, count // pp) == 0
    return count >= max(1, order.fewest * pp)


def _needs(schedule: str, pp: int) -> str:
    order = ORDERS[schedule]
    return f"a multiple of {pp}" if order.several else f"at least {order.fewest * pp}"


def _fewer(layers: int) -> str:
    return f"every stage but the two ends needs a layer: a smaller pp, fewer stages a rank, or over {layers} layers"
