"""What a preflight leaves: lines that a human reads, and the files that the batch script acts on.

launch/preflight/START.json      everything
                 START.nodes     good nodes, one a line, in the order of the allocation
                 START.bad       NODE<TAB>REASON
                 START.stop      why no other nodes would help, one sentence a line
                 START.code      0 enough good nodes, 3 too few, 4 stop; written last
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardforge.core import units
from shardforge.launch.preflight_checks import ENOUGH, STOP, Verdict
from shardforge.launch.preflight_facts import Facts
from shardforge.launch.preflight_survey import Survey
from shardforge.launch.preflight_wanted import Wanted

SHOWN = 16
"""Bad nodes that the console names; the files name all."""


@dataclass(frozen=True)
class Report:
    start: str
    order: Sequence[str]
    wanted: Wanted
    survey: Survey
    verdict: Verdict
    seconds: float

    def lines(self) -> Iterator[str]:
        """For the console."""
        verdict = self.verdict
        yield f"preflight {self.start}: {self.sentence()} ({units.seconds(self.seconds)})"
        for why in verdict.stop:
            yield f"  stop: {why}"
        if verdict.short:
            yield f"  not started: {verdict.short}"
        for node, reasons in list(verdict.bad.items())[:SHOWN]:
            yield f"  {node} is bad: {'; '.join(reasons)}"
        if len(verdict.bad) > SHOWN:
            yield f"  and {len(verdict.bad) - SHOWN} bad nodes more"
        for warning in verdict.warnings:
            yield f"  warning: {warning}"
        yield from (f"  {line}" for line in _facts(self.survey.facts))
        yield from (f"  {line}" for line in _rates(self.survey, self.wanted))

    def sentence(self) -> str:
        """The verdict in one."""
        verdict, wanted = self.verdict, self.wanted.nodes
        counted = f"{len(verdict.good)} of {len(self.order)} nodes are good, {wanted} needed"
        if verdict.code == ENOUGH:
            return counted
        return f"{'stop' if verdict.code == STOP else 'not on these nodes, or not now'}: {counted}"

    def plain(self) -> dict[str, object]:
        """For JSON."""
        survey, verdict = self.survey, self.verdict
        return {
            "start": self.start,
            "verdict": self.sentence(),
            "code": verdict.code,
            "good": list(verdict.good),
            "bad": verdict.bad,
            "fatal": list(verdict.stop),
            "short": verdict.short,
            "warnings": list(verdict.warnings),
            "seconds": self.seconds,
            "order": list(self.order),
            "wanted": dataclasses.asdict(self.wanted),
            "facts": {node: dataclasses.asdict(facts) for node, facts in survey.facts.items()},
            "pairs": [dataclasses.asdict(rate) for rate in survey.pairs],
            "inside": [dataclasses.asdict(rate) for rate in survey.inside],
            "all_reduce": dataclasses.asdict(survey.together) if survey.together else None,
        }

    def write(self, folder: Path) -> None:
        """The files above, in `folder`. OSError where it cannot be written to."""
        folder.mkdir(parents=True, exist_ok=True)
        verdict = self.verdict
        parts = {
            "json": json.dumps(self.plain(), indent=1) + "\n",
            "nodes": "".join(f"{node}\n" for node in verdict.good),
            "bad": "".join(f"{node}\t{'; '.join(reasons)}\n" for node, reasons in verdict.bad.items()),
            "stop": "".join(f"{why}\n" for why in verdict.stop),
            "code": f"{verdict.code}\n",
        }
        for name, text in parts.items():
            scratch = folder / f".{self.start}.{name}"
            scratch.write_text(text)
            os.replace(scratch, folder / f"{self.start}.{name}")


def _facts(facts: dict[str, Facts]) -> Iterator[str]:
    if not facts:
        return
    some = next(iter(facts.values()))
    known = list(facts.items())
    gpus = f"{len(some.gpus)} x {some.gpus[0].name} · " if some.gpus else ""
    yield gpus + " · ".join(f"{name} {version}" for name, version in sorted(some.versions.items()))
    node, least = min(known, key=lambda each: each[1].free_memory)
    memory = f"memory {units.bytes_(least.free_memory)} free at the least ({node})"
    node, least = min(known, key=lambda each: each[1].write_bytes_s)
    disk = f"run directory {units.bytes_(least.free_disk)} free, {units.bytes_(least.write_bytes_s)}/s written ({node})"
    ahead = [each.clock_s for each in facts.values()]
    clocks = f" · clocks within {units.seconds(max(ahead) - min(ahead))}" if len(ahead) > 1 else ""
    yield f"{memory} · {disk}{clocks}"


def _rates(survey: Survey, wanted: Wanted) -> Iterator[str]:
    config = wanted.config
    measured = (("inside nodes", survey.inside, config.inside_gb_s), ("pairs", survey.pairs, config.pair_gb_s))
    for what, rates, floor in measured:
        if rates:
            least = min(rates, key=lambda rate: rate.gb_s)
            usual = statistics.median(rate.gb_s for rate in rates)
            asked = f", floor {floor:.3g}" if floor else ""
            yield f"{what} {least} at the least ({'-'.join(least.nodes)}), {usual:.3g} at the median{asked}"
    if survey.together:
        asked = f", floor {config.all_reduce_gb_s:.3g}" if config.all_reduce_gb_s else ""
        yield f"all-reduce over {len(survey.together.nodes)} nodes {survey.together}{asked}"
