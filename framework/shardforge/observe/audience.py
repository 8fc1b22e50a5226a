"""All observers of a run as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardforge.observe.base import EvalReport, Observer, RunInfo, StepReport


class Audience:
    """Passes every call on, in order. Empty on all ranks but the first."""

    def __init__(self, observers: Sequence[Observer]):
        self.observers = tuple(observers)

    def on_start(self, info: RunInfo) -> None:
        for each in self.observers:
            each.on_start(info)

    def on_step(self, report: StepReport) -> None:
        for each in self.observers:
            each.on_step(report)

    def on_eval(self, report: EvalReport) -> None:
        for each in self.observers:
            each.on_eval(report)

    def on_checkpoint(self, step: int, path: Path) -> None:
        for each in self.observers:
            each.on_checkpoint(step, path)

    def on_end(self, verdict: str) -> None:
        for each in self.observers:
            each.on_end(verdict)
