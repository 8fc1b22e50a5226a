"""What metrics.jsonl tells of a run: one value per step, however often the run was killed and resumed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

from shardforge.core.errors import DataError
from shardforge.observe.base import EvalReport, StepReport
from shardforge.observe.expert_history import ExpertHistory, gathered, packed

COLUMNS = tuple(item.name for item in fields(StepReport) if item.name not in ("terms", "experts", "slow"))
"""Numbers kept per step, named as in StepReport."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One life of the run."""

    time: float  # seconds since 1970
    name: str
    layout: str
    world_size: int
    weights: int
    steps: int
    first_step: int
    unigram_entropy: float | None = None
    attempt: Mapping[str, Any] | None = None  # see RunInfo; None before it was told


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps first_step+1 .. last_step, which one life computed and no later life took back."""

    first_step: int
    last_step: int
    layout: str
    world_size: int


@dataclass(kw_only=True)
class History:
    """One run. `columns` and `terms` hold plain lists, one entry per kept step, in order of step."""

    path: Path
    starts: list[Start]
    columns: dict[str, list[float]]  # name in StepReport -> values; nan where not finite or not told
    terms: dict[str, list[float]] = field(default_factory=dict)  # part of the objective -> values; nan where absent
    experts: ExpertHistory | None = None  # of a mixture
    evals: list[EvalReport] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    verdict: str = "unfinished"  # "finished", "stopped", "failed"; "unfinished": running, or killed
    wall_seconds: float = 0.0  # from start to last word, summed over all lives, steps taken back included

    @property
    def name(self) -> str:
        return self.starts[-1].name

    @property
    def steps(self) -> list[int]:
        return self.columns["step"]  # type: ignore[return-value]

    @property
    def segments(self) -> list[Segment]:
        out = []
        for index, start in enumerate(self.starts):
            ends = [later.first_step for later in self.starts[index + 1 :]]
            last = min([*ends, self.steps[-1] if self.steps else 0])
            if last > start.first_step:
                out.append(
                    Segment(
                        first_step=start.first_step, last_step=last, layout=start.layout, world_size=start.world_size
                    )
                )
        return out

    @property
    def resumes(self) -> list[int]:
        """Steps after which another life goes on."""
        return [segment.first_step for segment in self.segments if segment.first_step > 0]

    @property
    def unigram_entropy(self) -> float | None:
        return self.starts[-1].unigram_entropy

    def training_seconds(self) -> list[float]:
        """Wall time of the kept steps up to and with each of them."""
        return list(accumulate(0.0 if math.isnan(value) else value for value in self.columns["seconds"]))

    def at(self, step: int, values: list[float]) -> float:
        """The entry of a per-step list at the last kept step that is not after `step`; 0 before the first."""
        index = bisect.bisect_right(self.steps, step) - 1
        return values[index] if index >= 0 else 0.0


def collect(path: Path, events: Iterable[Mapping[str, Any]]) -> History:
    """The last value of every step; a start at step k takes back what an earlier life did after k."""
    starts: list[Start] = []
    steps: dict[int, Mapping[str, Any]] = {}
    evals: dict[int, EvalReport] = {}
    checkpoints: set[int] = set()
    verdict, wall, begun, latest = "unfinished", 0.0, 0.0, 0.0
    for event in events:
        kind = event["event"]
        if kind == "start":
            wall, begun = wall + latest - begun, event["time"]
            facts: dict[str, Any] = {item.name: event.get(item.name) for item in fields(Start)}
            starts.append(Start(**facts))
            kept = event["first_step"]
            steps = {step: value for step, value in steps.items() if step <= kept}
            evals = {step: value for step, value in evals.items() if step <= kept}
            checkpoints = {step for step in checkpoints if step <= kept}
            verdict = "unfinished"
        elif kind == "step":
            steps[event["step"]] = {**event, "experts": packed(event["experts"])} if "experts" in event else event
        elif kind == "eval":
            evals[event["step"]] = held_out(event)
        elif kind == "checkpoint":
            checkpoints.add(event["step"])
        elif kind == "end":
            verdict = event["verdict"]
        latest = event["time"]
    if not starts:
        raise DataError("no run has started here: the file has no start event", path, "train first, then look again")
    rows = [steps[step] for step in sorted(steps)]
    names = sorted({name for row in rows for name in row["terms"]})
    return History(
        path=path,
        starts=starts,
        columns={name: [number(row.get(name)) for row in rows] for name in COLUMNS},
        terms={name: [number(row["terms"].get(name)) for row in rows] for name in names},
        experts=gathered(rows),
        evals=[evals[step] for step in sorted(evals)],
        checkpoints=sorted(checkpoints),
        verdict=verdict,
        wall_seconds=wall + latest - begun,
    )


def held_out(event: Mapping[str, Any]) -> EvalReport:
    """The report that an event "eval" tells of; a key of JSON is a string."""
    alike = {int(layer): number(value) for layer, value in event.get("similarity", {}).items()}
    return EvalReport(step=event["step"], loss=number(event["loss"]), tokens=event["tokens"], similarity=alike)


def number(value: float | None) -> float:
    """JSON has no nan: what was not finite is written as null. What an older version did not write is nan too."""
    return math.nan if value is None else value
