"""metrics.jsonl: every event of a run, one JSON object a line, appended and flushed at once.

    {"event": "start", "time": ..., "name": ..., "layout": ..., "first_step": 0, ...}
    {"event": "step", "time": ..., "step": 1, "loss": ..., ...}       every field of StepReport; experts as in `health`,
                                                                      slow where some rank is
    {"event": "eval" | "checkpoint" | "end", "time": ..., ...}

Numbers that are not finite are null. A kill can tear the last line; whatever follows the last newline was never said.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from shardforge.core.errors import DataError, EngineError
from shardforge.observe import health
from shardforge.observe.base import EvalReport, Observer, RunInfo, Slow, StepReport
from shardforge.observe.history import History, collect, held_out, number

STEP_FIELDS = tuple(item.name for item in fields(StepReport) if item.name not in ("experts", "slow"))
INFO_FIELDS = tuple(item.name for item in fields(RunInfo) if item.name not in ("path", "recipe"))


class MetricsFile:
    """The observer that every run has. `clock` gives seconds since 1970."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self.path, self._clock = path, clock
        self._file: int | None = None
        self._begun = False

    def on_start(self, info: RunInfo) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, _whole(self._file))
        self._begun = False
        self._say("start", {name: getattr(info, name) for name in INFO_FIELDS})

    def on_step(self, report: StepReport) -> None:
        values = {name: getattr(report, name) for name in STEP_FIELDS}
        if report.experts:
            edge = not self._begun or report.step == report.steps
            loads = edge or report.step % health.stride(report.experts) == 0
            values["experts"] = health.record(report.experts, loads=loads)
        if report.slow:
            values["slow"] = [asdict(each) for each in report.slow]
        self._begun = True
        self._say("step", values)

    def on_eval(self, report: EvalReport) -> None:
        values: dict[str, Any] = {"step": report.step, "loss": report.loss, "tokens": report.tokens}
        if report.similarity:
            values["similarity"] = report.similarity
        self._say("eval", values)

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say("checkpoint", {"step": step, "path": os.path.relpath(path, self.path.parent)})

    def on_end(self, verdict: str) -> None:
        self._say("end", {"verdict": verdict})
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _say(self, event: str, values: Mapping[str, Any]) -> None:
        if self._file is None:
            raise AssertionError(f"{event} outside of on_start .. on_end of {self.path}")
        line = json.dumps(_finite({"event": event, "time": self._clock(), **values}), allow_nan=False) + "\n"
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line.encode())
            problem = None if written == len(line.encode()) else "the disk took only part of a line"
        except OSError as error:
            problem = str(error.strerror)
        if problem:
            os.ftruncate(self._file, size)
            raise EngineError(
                f"metrics cannot be written: {problem}",
                self.path,
                "make room on that disk and start the run again; it resumes from its last checkpoint",
            )


class Tail:
    """Reads the events of a file that may still grow; each call of `new` goes on where the last one ended."""

    def __init__(self, path: Path):
        self.path, self._offset, self._line = path, 0, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Events whose line is complete. DataError when a complete line is not an event."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                self._line += 1
                yield _event(raw, f"{self.path}:{self._line}")


def read(path: Path) -> History:
    """The history in a metrics.jsonl. DataError when it is missing, damaged or empty."""
    if not path.is_file():
        raise DataError("there is no metrics.jsonl", path.parent, "name the folder of a run that has started")
    return collect(path, Tail(path).new())


def replay(event: Mapping[str, Any], observer: Observer, run: Path) -> None:
    """Tell `observer` what happened in the run directory `run`; unknown events are passed over."""
    kind = event["event"]
    if kind == "start":
        facts: dict[str, Any] = {name: event.get(name) for name in INFO_FIELDS}
        facts["attempt"] = facts["attempt"] or {}  # an older version said nothing of it
        observer.on_start(RunInfo(path=run, recipe={}, **facts))
    elif kind == "step":
        values = {name: number(event[name]) for name in STEP_FIELDS if name != "terms" and name in event}
        terms = {name: number(value) for name, value in event["terms"].items()}
        experts = health.recall(event["experts"]) if "experts" in event else {}
        slow = tuple(Slow(**each) for each in event.get("slow", ()))
        observer.on_step(StepReport(**values, terms=terms, experts=experts, slow=slow))  # type: ignore[arg-type]
    elif kind == "eval":
        observer.on_eval(held_out(event))
    elif kind == "checkpoint":
        observer.on_checkpoint(event["step"], run / event["path"])
    elif kind == "end":
        observer.on_end(event["verdict"])


def _event(raw: bytes, where: str) -> dict[str, Any]:
    try:
        event = json.loads(raw)
        if isinstance(event, dict) and "event" in event and "time" in event:
            return event
    except ValueError:  # also UnicodeDecodeError
        pass
    raise DataError(
        "this line is not an event of a run", where, "delete the line; the other lines stand for themselves"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole(file: int) -> int:
    """Bytes up to and with the last newline."""
    end = os.fstat(file).st_size
    while end > 0:
        start = max(0, end - 65536)
        cut = os.pread(file, end - start, start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0
