"""When each action of a schedule runs, for given costs: ranks work in their order and wait for what they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shardforge.plan.order import SENDS, Action, Work, script


@dataclass(frozen=True)
class Cost:
    """Time of one micro-batch in one stage, in any unit."""

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0

    @property
    def total(self) -> float:
        return self.forward + self.input_grad + self.weight_grad

    def of(self, work: Work) -> float:
        whole = self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad, "B": whole}[work]

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.forward * factor, self.input_grad * factor, self.weight_grad * factor)


class Span(NamedTuple):
    """One action in time."""

    start: float
    end: float
    action: Action


@dataclass(frozen=True)
class Timeline:
    """A schedule in time. `stages` is the rank of each stage; `spans` are in order, rank by rank."""

    schedule: str
    micro_batches: int
    stages: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.spans)

    @property
    def chunks(self) -> int:
        """Stages of a rank."""
        return len(self.stages) // self.ranks

    @property
    def time(self) -> float:
        """From the first start to the last end over all ranks."""
        return max(spans[-1].end for spans in self.spans)

    def idle(self, rank: int) -> float:
        return self.time - sum(span.end - span.start for span in self.spans[rank])

    @property
    def bubbles(self) -> tuple[float, ...]:
        """Share of the time in which each rank waits."""
        return tuple(self.idle(rank) / self.time for rank in range(self.ranks))

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which they wait."""
        return sum(self.bubbles) / self.ranks

    def peaks(self, weight: Sequence[float], halved: Sequence[float] | None = None) -> tuple[float, ...]:
        """Largest sum of weight[stage] over the activations that each rank holds at one time.

        The activations of a micro-batch in a stage live from the start of F to the end of its B or W; from the start
        of I on they count halved[stage], as the gradients between a split backward pass are there too.
        """
        return tuple(max(held for _, held in self.live(rank, weight, halved)) for rank in range(self.ranks))

    def live(
        self, rank: int, weight: Sequence[float], halved: Sequence[float] | None = None
    ) -> list[tuple[float, float]]:
        """(time, held) of a rank: what it holds from each time on, see `peaks`."""
        half = weight if halved is None else halved
        changes = []
        for start, end, (work, stage, _) in self.spans[rank]:
            if work == "F":
                changes.append((start, 1, weight[stage]))
            elif work == "I":
                changes.append((start, 1, half[stage] - weight[stage]))
            else:
                changes.append((end, 0, -weight[stage] if work == "B" else -half[stage]))
        held, out = 0.0, []
        for time, _, change in sorted(changes):
            held += change
            out.append((time, held))
        return out


def simulate(
    schedule: str, stages: Sequence[int], micro_batches: int, costs: Sequence[Cost], latency: float = 0.0
) -> Timeline:
    """Run a schedule over `stages`, the rank of each, with costs[stage]; a message takes `latency` and no work.

    LayoutError for a number of micro-batches that the schedule cannot run.
    """
    rows = script(schedule, stages, micro_batches)
    at = [0] * len(rows)
    done: dict[Action, float] = {}
    sent: dict[Action, float] = {}
    free = [0.0] * len(rows)
    spans: list[list[Span]] = [[] for _ in rows]
    waiting = True
    while waiting:
        waiting = False
        for rank, row in enumerate(rows):
            while at[rank] < len(row):
                action = row[at[rank]]
                if action.work in SENDS:
                    sent[action._replace(work="F" if action.work == "SF" else "I")] = free[rank] + latency
                else:
                    needed = _needed(action, len(stages))
                    known = [done if stages[each.stage] == rank else sent for each in needed]
                    if any(each not in there for each, there in zip(needed, known, strict=True)):
                        break
                    start = max([free[rank], *(there[each] for each, there in zip(needed, known, strict=True))])
                    end = free[rank] = start + costs[action.stage].of(action.work)
                    done[_settled(action)] = end
                    spans[rank].append(Span(start, end, action))
                at[rank] += 1
                waiting = True
    stuck = [str(row[place]) for row, place in zip(rows, at, strict=True) if place < len(row)]
    assert not stuck, f"{schedule} waits for ever at {stuck}"
    return Timeline(schedule, micro_batches, tuple(stages), tuple(tuple(row) for row in spans))


def _settled(action: Action) -> Action:
    """What others wait for: a whole backward gives the gradient of the input too."""
    return action._replace(work="I") if action.work == "B" else action


def _needed(action: Action, stages: int) -> list[Action]:
    """What must be done before."""
    work, stage, micro = action
    if work == "F":
        return [Action("F", stage - 1, micro)] if stage else []
    if work == "W":
        return [Action("I", stage, micro)]
    after = [Action("I", stage + 1, micro)] if stage + 1 < stages else []
    return [Action("F", stage, micro), *after]
