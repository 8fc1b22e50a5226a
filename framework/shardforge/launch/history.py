"""RUN/launch/attempts.jsonl: how each attempt to run began and how it ended, one JSON object a line.

    {"event": "begin", "start": "4711.0.0", "job": "4711", "restart": 0, "try": 0, "nodes": ["n1"], "step": 100,
     "reason": "first", "time": ...}
    {"event": "end", "start": "4711.0.0", "outcome": "stopped", "step": 300, "reason": "walltime",
     "decision": "again walltime", "failed_step": null, "blamed": [], "time": ...}

Lines are only ever added, and each in one write. What a kill or a full disk left of a line was never said.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardforge.core.errors import LaunchError


@dataclass(frozen=True, kw_only=True)
class End:
    outcome: str  # finished, stopped, failed or lost
    step: int  # of the last committed checkpoint
    reason: str  # its first word is the kind
    decision: str = ""  # what was to be done; "" when the attempt was found without an end, and nobody was asked
    failed_step: int | None = None  # in which it crashed
    blamed: tuple[str, ...] = ()  # nodes whose ranks died or froze
    time: float = 0.0  # seconds since 1970

    @property
    def kind(self) -> str:
        return kind(self.reason)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    start: str  # JOB.RESTART.TRY
    job: str
    restart: int = 0  # how often Slurm had started the job again
    tried: int = 0  # how often the script had started the training again inside of the job
    nodes: tuple[str, ...] = ()
    step: int = 0  # of the last committed checkpoint
    reason: str = ""  # why there was an attempt
    time: float = 0.0  # seconds since 1970
    end: End | None = None

    @property
    def advanced(self) -> bool:
        """Whether it left a checkpoint that was not there before."""
        return self.end is not None and self.end.step > self.step


def kind(reason: str) -> str:
    """The first word of a reason: walltime, SIGTERM, crash, lost, preflight, occupied, ended, or any of a person."""
    return reason.split(" ", 1)[0].rstrip(":")


def read(path: Path) -> list[Attempt]:
    """All attempts in the order in which they began; an empty list without a file."""
    found: dict[str, Attempt] = {}
    for event in events(path):
        try:
            _take(found, event)
        except (KeyError, TypeError, ValueError):
            continue
    return list(found.values())


def _take(found: dict[str, Attempt], event: Mapping[str, Any]) -> None:
    start = str(event["start"])
    if event["event"] == "begin":
        found.setdefault(start, _attempt(start, event))
    elif event["event"] == "end" and start in found:
        before = found[start].end
        if before is None or not before.decision:  # a presumed end is corrected by one that was seen
            found[start] = replace(found[start], end=_end(event))


def _attempt(start: str, event: Mapping[str, Any]) -> Attempt:
    return Attempt(
        start=start,
        job=str(event["job"]),
        restart=int(event["restart"]),
        tried=int(event["try"]),
        nodes=tuple(map(str, event["nodes"])),
        step=int(event["step"]),
        reason=str(event.get("reason", "")),
        time=float(event["time"]),
    )


def _end(event: Mapping[str, Any]) -> End:
    at = event.get("failed_step")
    return End(
        outcome=str(event["outcome"]),
        step=int(event["step"]),
        reason=str(event["reason"]),
        decision=str(event.get("decision", "")),
        failed_step=None if at is None else int(at),
        blamed=tuple(map(str, event.get("blamed", ()))),
        time=float(event["time"]),
    )


def find(history: Sequence[Attempt], start: str) -> Attempt | None:
    return next((attempt for attempt in history if attempt.start == start), None)


def named(start: str, nodes: Sequence[str], step: int, reason: str) -> Attempt:
    """A new attempt from its name, JOB.RESTART.TRY. LaunchError for another one."""
    job, *numbers = start.split(".")
    if not job or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise LaunchError(f"{start!r} is no name of an attempt", "--start", "it is JOB.RESTART.TRY, such as 4711.0.0")
    restart, tried = map(int, numbers)
    return Attempt(
        start=start,
        job=job,
        restart=restart,
        tried=tried,
        nodes=tuple(nodes),
        step=step,
        reason=reason,
        time=time.time(),
    )


def begun(path: Path, attempt: Attempt) -> None:
    """Add its begin line."""
    names = ("start", "job", "restart", "nodes", "step", "reason", "time")
    append(path, {"event": "begin", **{name: getattr(attempt, name) for name in names}, "try": attempt.tried})


def ended(path: Path, start: str, end: End) -> None:
    """Add the end line of the attempt `start`."""
    names = ("outcome", "step", "reason", "decision", "failed_step", "blamed", "time")
    append(path, {"event": "end", "start": start, **{name: getattr(end, name) for name in names}})


def append(path: Path, event: Mapping[str, Any]) -> None:
    """Add one line that is on the disk when this returns. LaunchError when the disk does not take all of it."""
    line = json.dumps(event).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            text = b"\n" + line if torn else line
            whole = os.write(file, text) == len(text)
            os.fsync(file)
        finally:
            os.close(file)
        problem = "" if whole else "the disk took only part of a line"
    except OSError as error:
        problem = str(error.strerror or error)
    if problem:
        raise LaunchError(f"what happened cannot be noted: {problem}", path, "make room there, or make it writable")


def put(path: Path, text: str) -> None:
    """Leave a small file that has all of its text whenever somebody reads it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(f"{text}\n")
    os.replace(beside, path)


def events(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, whole lines that are none left out; an empty list without a file."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as cause:
        raise LaunchError(
            f"what happened cannot be read: {cause.strerror or cause}", path, "is its disk there?"
        ) from cause
    found = []
    for line in lines[:-1]:  # what follows the last newline was never said
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found
