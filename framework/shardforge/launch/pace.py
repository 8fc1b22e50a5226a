"""How far a run is and how fast, from the end of its metrics.jsonl: the rest is not read, however long the run is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.observe.base import EvalReport, RunInfo, StepReport
from shardforge.observe.jsonl import replay
from shardforge.observe.throughput import Rates, Throughput

BLOCK_BYTES, MOST_BYTES = 1 << 17, 1 << 24
STEPS = 21
"""Steps that are read: those of the window, and the first of a life, which says nothing of the speed."""


@dataclass(frozen=True)
class Pace:
    """`report` and `rates` are None before the first step; times are seconds since 1970."""

    news: float  # time of the last event
    report: StepReport | None = None
    rates: Rates | None = None
    verdict: str = ""  # finished, stopped or failed; "" while it runs, or when it was killed


def pace(path: Path) -> Pace | None:
    """None without a file, or without an event in it."""
    seen = _Seen()
    latest: dict[str, Any] | None = None
    for latest in reversed(list(_newest(path))):
        if latest["event"] in ("start", "step"):
            replay(_light(latest), seen, path.parent)
    if latest is None:
        return None
    verdict = str(latest.get("verdict", "")) if latest["event"] == "end" else ""
    return Pace(float(latest["time"]), seen.report, seen.rates, verdict)


def _light(event: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "experts"}


def _newest(path: Path) -> Iterator[dict[str, Any]]:
    """The last events, the newest first, until there are enough steps among them."""
    steps = 0
    for line in _lines_from_end(path):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict) or "event" not in event or "time" not in event:
            continue
        yield event
        steps += event["event"] == "step"
        if steps == STEPS:
            return


def _lines_from_end(path: Path) -> Iterator[bytes]:
    """Whole lines, the last first; what follows the last newline is not one."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        left, rest, first = MOST_BYTES, b"", True
        while end > 0 and left > 0:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            head, *lines = (file.read(end - start) + rest).split(b"\n")
            if first and lines:
                lines, first = lines[:-1], False
            yield from reversed(lines)
            end, left, rest = start, left - BLOCK_BYTES, head
        if end == 0 and not first:
            yield rest


class _Seen:
    """The observer of a replay that keeps the last step and the speed."""

    def __init__(self) -> None:
        self._throughput = Throughput()
        self.report: StepReport | None = None
        self.rates: Rates | None = None

    def on_start(self, info: RunInfo) -> None:
        self._throughput.restart()

    def on_step(self, report: StepReport) -> None:
        self.report, self.rates = report, self._throughput.add(report)

    def on_eval(self, report: EvalReport) -> None:
        pass

    def on_checkpoint(self, step: int, path: Path) -> None:
        pass

    def on_end(self, verdict: str) -> None:
        pass
