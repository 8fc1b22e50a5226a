"""How an attempt ended, from what it left behind: the files of its run directory, the exit code, and Slurm's view.

An exit code alone says little: torchrun ends with 1 whatever its ranks returned, and srun with the highest code of its
tasks, those among them that it ended itself. So the files decide where there are any, of this attempt and not of an
earlier one, and Slurm's view goes before what a rank said when others were taken from it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardforge.checkpoint import folders
from shardforge.core.rundir import RunDir
from shardforge.launch.history import Attempt, End, find, kind

MISTAKE, INTERRUPTED = 2, 130
UNREPAIRABLE = 4
"""Exit code of a preflight that failed for a reason that no other node mends."""
GONE = ("dead", "frozen")
"""States of a rank that may be its node's fault."""
CUT = 200
OUTSIDE = ("walltime", "SIGTERM", "SIGUSR1", "requeue")
"""Reasons to stop that do not end the run: it goes on as soon as it may."""


@dataclass(frozen=True, kw_only=True)
class Traces:
    """What is there to be seen after an attempt. `stopped`, `failure` and `occupied` may be of another one."""

    step: int  # of the last committed checkpoint
    stopped: Mapping[str, Any] | None = None
    failure: Mapping[str, Any] | None = None
    occupied: Mapping[str, Any] | None = None
    wish: str | None = None  # text of a STOP file that no rank has followed
    phase: str = "train"  # or preflight: in which the attempt ended
    code: int | None = None  # exit code of that; None when nobody saw it end
    state: str = ""  # JobState of Slurm, "" when nobody asked
    preempted: bool = False  # Slurm has named a time at which it takes the nodes away
    lost: tuple[str, ...] = ()  # nodes of the attempt that are down now
    bad: Mapping[str, str] = field(default_factory=dict)  # nodes that preflight refused, with its reasons
    fatal: tuple[str, ...] = ()  # why preflight says that no other node mends it


@dataclass(frozen=True)
class Ending:
    """`reason` begins with its kind; `final` when no further attempt is wanted, or none would end otherwise."""

    outcome: str
    reason: str
    final: bool = False
    failed_step: int | None = None
    nodes: tuple[str, ...] = ()  # to do without from now on
    blamed: tuple[str, ...] = ()  # whose ranks died or froze, which alone says little

    @property
    def kind(self) -> str:
        return kind(self.reason)

    def line(self, step: int, now: float) -> End:
        """What is noted of it; `step` is the last committed one. The decision is open."""
        return End(
            outcome=self.outcome,
            step=step,
            reason=self.reason,
            failed_step=self.failed_step,
            blamed=self.blamed,
            time=now,
        )


def ending(attempt: Attempt, traces: Traces, history: Sequence[Attempt]) -> Ending:
    """How `attempt` ended. `history` is asked who else lives."""
    stopped = traces.stopped if said_by(traces.stopped, attempt.start) else None
    failure = traces.failure if said_by(traces.failure, attempt.start) else None
    if stopped is not None and stopped.get("state") == "finished":
        return Ending("finished", "all steps are done")
    if said_by(traces.occupied, attempt.start):
        return _occupied(attempt, str((traces.occupied or {}).get("owner", "")), history)
    if traces.wish is not None and kind(traces.wish) not in OUTSIDE:
        return Ending("stopped", traces.wish, final=True)
    if stopped is not None:
        return _stopped(str(stopped.get("reason", "")))
    if failure is not None and failure.get("code") == MISTAKE:
        return Ending("failed", f"mistake: {headline(failure)}", final=True)
    if failure is not None and failure.get("code") == INTERRUPTED:
        return Ending("stopped", "interrupted by a person", final=True)
    if traces.phase == "preflight" and (found := _preflight(traces)):
        return found
    return _cut_off(attempt, traces, failure) or _crash(attempt, traces, failure)


def said_by(said: Mapping[str, Any] | None, start: str) -> bool:
    """Whether a file is of the attempt `start`; ranks may have put more behind its name."""
    found = str((said or {}).get("start", ""))
    return found == start or found.startswith(f"{start}-")


def _stopped(reason: str) -> Ending:
    known = kind(reason)
    if known == "SIGUSR1":
        return Ending("stopped", "walltime (SIGUSR1)")
    return Ending("stopped", reason or "asked by nobody known", final=known not in OUTSIDE)


def _preflight(traces: Traces) -> Ending | None:
    why = "; ".join(traces.fatal) or "; ".join(f"{node}: {reason}" for node, reason in traces.bad.items())
    if traces.code == UNREPAIRABLE or traces.fatal:
        return Ending("failed", f"preflight: {_cut(why or 'it names no reason')}", final=True)
    if traces.bad:
        return Ending("failed", f"preflight: {_cut(why)}", nodes=tuple(traces.bad))
    return None


def _occupied(attempt: Attempt, owner: str, history: Sequence[Attempt]) -> Ending:
    """Another process holds the directory: the rest of an attempt that is over goes away, another job does not."""
    other = find(history, owner.split("-", 1)[0])
    alive = other is not None and other.end is None and other.job != attempt.job
    told = f"occupied: {owner or 'another process'} holds the run directory"
    return Ending("failed", told, final=alive)


def _cut_off(attempt: Attempt, traces: Traces, failure: Mapping[str, Any] | None) -> Ending | None:
    """The ranks were taken away, whatever those that were left said of it."""
    lost = [node for node in traces.lost if node in attempt.nodes or not attempt.nodes]
    if lost:
        told = f": {headline(failure)}" if failure else ""
        return Ending("lost", _cut(f"lost {', '.join(lost)}{told}"))
    if traces.state not in ("", "RUNNING"):
        return Ending("lost", f"ended by Slurm ({traces.state})")
    if traces.preempted:
        return Ending("lost", "SIGTERM: preempted before it had saved")
    if traces.code is None and failure is None:
        return Ending("lost", "lost with its node or its job")
    return None


def _crash(attempt: Attempt, traces: Traces, failure: Mapping[str, Any] | None) -> Ending:
    if failure is None:
        if traces.wish is not None:
            return Ending("failed", f"{kind(traces.wish)} came before the run had saved")
        where = "preflight" if traces.phase == "preflight" else "the step"
        return Ending("failed", f"crash: {where} ended with {_code(traces.code)}, and no rank said why")
    at, node = failure.get("step"), failure.get("node")
    where = f"crash in step {at}" if isinstance(at, int) else "crash"
    return Ending(
        "failed",
        f"{where}: {_cut(_gone(failure) + headline(failure))}",
        failed_step=at if isinstance(at, int) else None,
        nodes=(node,) if isinstance(node, str) and node in attempt.nodes else (),
        blamed=_blamed(attempt, failure),
    )


def _blamed(attempt: Attempt, failure: Mapping[str, Any]) -> tuple[str, ...]:
    nodes = {str(each.get("node")) for each in _ranks_gone(failure)}
    return tuple(node for node in attempt.nodes if node in nodes)


def _gone(failure: Mapping[str, Any]) -> str:
    """rank 3 on node2 dead, and 7 more; for ranks that are gone."""
    gone = _ranks_gone(failure)
    more = f", and {len(gone) - 1} more" if len(gone) > 1 else ""
    return f"rank {gone[0].get('rank')} on {gone[0].get('node')} {gone[0].get('state')}{more}; " if gone else ""


def _ranks_gone(failure: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = failure.get("blamed")
    ranks = [each for each in said if isinstance(each, dict)] if isinstance(said, list) else []
    return [each for each in ranks if each.get("state") in GONE]


def _code(code: int | None) -> str:
    known = {each.value: each.name for each in signal.Signals}
    name = known.get((code or 0) - 128)
    return f"code {code}" + (f" ({name})" if name else "")


def headline(failure: Mapping[str, Any]) -> str:
    """One line of what a rank said: its first, and the last of a traceback. A place that is only a path is left out."""
    lines = [line.strip() for line in str(failure.get("message", "")).splitlines() if line.strip()]
    if not lines:
        return "no rank said why"
    if "Traceback" in "".join(lines[:3]) and len(lines) > 1:
        return _cut(f"{lines[0].rstrip(':')}: {lines[-1]}")
    place, _, what = lines[0].removeprefix("error: ").rpartition("  ")
    return _cut(f"{what} ({place})" if place and not place.startswith("/") else what)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CUT else text[: CUT - 3] + "..."


def look(run_dir: RunDir, start: str, **seen: Any) -> Traces:
    """The traces in a run directory; `seen` is what only the caller knows."""
    try:
        wish: str | None = " ".join(run_dir.stop.read_text(errors="replace").split()) or "STOP file"
    except FileNotFoundError:
        wish = None
    preflight = run_dir.launch / "preflight"
    return Traces(
        step=max(folders.committed(run_dir.checkpoints), default=0),
        stopped=load(run_dir.stopped),
        failure=load(run_dir.failure),
        occupied=load(run_dir.occupied(start)),
        wish=wish,
        bad=_bad(preflight / f"{start}.bad"),
        fatal=tuple(_lines(preflight / f"{start}.stop")),
        **seen,
    )


def _bad(path: Path) -> dict[str, str]:
    pairs = (line.partition("\t") for line in _lines(path))
    return {node.strip(): reason.strip() or "refused" for node, _, reason in pairs}


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return []


def load(path: Path) -> dict[str, Any] | None:
    """A small JSON object; None where there is none, or a writer was killed in the middle of it."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None
