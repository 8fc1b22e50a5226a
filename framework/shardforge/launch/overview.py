"""What is known of a run at this moment, from its files and from the queue: `shardforge status` prints it."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.checkpoint import folders
from shardforge.core.errors import LaunchError, suggest
from shardforge.core.rundir import RunDir
from shardforge.launch import history, queue
from shardforge.launch.ending import headline, load
from shardforge.launch.history import Attempt
from shardforge.launch.pace import Pace, pace
from shardforge.launch.queue import Job

DEEPEST = 4
"""Folders between runs/ and a run: runs of a sweep lie in a folder of their own."""


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Times are seconds since 1970, None when not known."""

    path: Path
    state: str  # starting, running, stopping, queued, requeued, held, finished, stopped, failed, lost or new
    why: str = ""
    jobs: tuple[Job, ...] = ()  # that run or wait, these last
    excluded: str = ""  # nodes that its job may not have any more
    owner: str = ""  # "process 17 on node1" of a living run
    layout: str = ""
    device: str = ""  # "8 x NVIDIA H100"
    pace: Pace | None = None
    saved: int | None = None  # step of the last checkpoint
    saved_at: float | None = None
    attempts: tuple[Attempt, ...] = ()
    starts: int = 0  # of the training itself
    verdict: str = ""  # the last failure in one line
    verdict_at: float | None = None
    verdict_page: Path | None = None


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, begun or only submitted."""
    run = RunDir(path)
    return run.metrics.is_file() or run.jobs.is_file() or (run.recipe.is_file() and run.checkpoints.is_dir())


def expect_run(path: Path) -> None:
    """LaunchError unless a folder is a run directory."""
    if is_run(path):
        return
    beside = [each.name for each in path.parent.iterdir() if is_run(each)] if path.parent.is_dir() else []
    what = "this folder is no run directory" if path.is_dir() else "there is no such run directory"
    raise LaunchError(what, path, suggest(path.name, beside) or "name the folder of a run, like runs/first")


def runs_below(root: Path, deep: int = DEEPEST) -> Iterator[Path]:
    """The run directories in a folder, or the folder itself, by name."""
    if is_run(root):
        yield root
        return
    if deep == 0 or not root.is_dir():
        return
    with os.scandir(root) as entries:
        inside = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for each in inside:
        yield from runs_below(Path(each), deep - 1)


def submissions(run: RunDir) -> list[dict[str, Any]]:
    """The lines of jobs.jsonl that name a job."""
    return [each for each in history.events(run.jobs) if each.get("job")]


def job_ids(run: RunDir) -> list[str]:
    """Ids of all jobs of a run, the oldest first; of those that were submitted by hand, the one that began last."""
    submitted = [str(each["job"]) for each in submissions(run)]
    last = [each.job for each in history.read(run.attempts)[-1:]]
    return list(dict.fromkeys([*submitted, *last]))


def last_job(run: RunDir) -> str:
    """Id of the job that began last, or of the last submission before any did; "" without one."""
    attempts, submitted = history.read(run.attempts), submissions(run)
    return attempts[-1].job if attempts else str(submitted[-1]["job"]) if submitted else ""


def overview(run: RunDir, known: Mapping[str, Job], fates: Mapping[str, str], owner: str) -> Overview:
    """`known` are the jobs of the queue by submitted id, `fates` the last state of those that it has forgotten; `owner`
    names the process of a living run, "" without one."""
    attempts = tuple(history.read(run.attempts))
    jobs = [known[each] for each in job_ids(run) if each in known]
    over = {each: job.state for each, job in known.items() if not job.runs and not job.waits}
    last = last_job(run)
    fate = f"job {last} {word}" if (word := over.get(last) or fates.get(last)) else ""
    present = tuple(sorted((job for job in jobs if job.runs or job.waits), key=lambda job: not job.runs))
    speed = pace(run.metrics)
    state, why = standing(run, present, attempts, speed, owner, fate)
    starts = _starts(run)
    begun = starts[-1] if starts else {}
    steps = folders.committed(run.checkpoints)
    verdict, said_at, page = _verdict(run)
    return Overview(
        path=run.path,
        state=state,
        why=why,
        jobs=present,
        owner=owner,
        layout=str(begun.get("layout", "")),
        device=str(begun.get("device", "")),
        pace=speed,
        saved=steps[-1] if steps else None,
        saved_at=_time_of(run.checkpoints / folders.name(steps[-1]) / folders.MARKER) if steps else None,
        attempts=attempts,
        starts=len(starts),
        verdict=verdict,
        verdict_at=said_at,
        verdict_page=page,
    )


def standing(
    run: RunDir, jobs: Sequence[Job], attempts: Sequence[Attempt], speed: Pace | None, owner: str, fate: str
) -> tuple[str, str]:
    """One word for the state, and what explains it. `jobs` run or wait; `fate` says how the last of all ended."""
    running = next((job for job in jobs if job.runs), None)
    if running is not None:
        return _running(running, attempts, speed, owner)
    if owner:
        return ("stopping", "asked to") if run.stop.exists() else ("running", "")
    if jobs:
        return _waiting(jobs[0], attempts)
    if attempts:
        return _ended(attempts[-1], fate)
    state, why = _alone(run, speed)
    return (state, why) if not fate or state != "new" else ("failed", f"{fate} before it began")


def _running(job: Job, attempts: Sequence[Attempt], speed: Pace | None, owner: str) -> tuple[str, str]:
    if job.state == "COMPLETING":
        return "stopping", "Slurm ends or requeues the job"
    here = next((each for each in reversed(attempts) if job.stands_for(each.job)), None)
    if here is None or here.end is not None:
        return "starting", "preflight, or between two attempts"
    moving = speed is not None and speed.news > here.time
    return ("running", "") if moving or owner else ("starting", "the ranks load")


def _waiting(job: Job, attempts: Sequence[Attempt]) -> tuple[str, str]:
    before = next((each for each in reversed(attempts) if job.stands_for(each.job)), None)
    why = before.end.reason if before is not None and before.end is not None else ""
    if job.held:
        return "held", why or job.reason
    return ("requeued", why) if before is not None else ("queued", job.reason)


def _ended(last: Attempt, fate: str) -> tuple[str, str]:
    """A cluster run of which Slurm has no job any more."""
    if last.end is None:
        return "lost", fate or "its job is gone, and nobody saw the end"
    if last.end.outcome == "finished":
        return "finished", ""
    if last.end.kind in ("SIGTERM", "ended") and fate:  # Slurm alone knows whether it was preempted or cancelled
        return "stopped", fate
    if last.end.outcome == "stopped":
        return "stopped", last.end.reason
    return ("failed" if last.end.decision.startswith("stop") else last.end.outcome), last.end.reason


def _alone(run: RunDir, speed: Pace | None) -> tuple[str, str]:
    """A run on this machine, or one whose job never began, from what it wrote last."""
    said = {path: _time_of(path) or 0.0 for path in (run.stopped, run.failure)}
    newest = max(said, key=lambda path: said[path])
    found = load(newest) if said[newest] else None
    if found is not None and newest == run.failure:
        return "failed", headline(found)
    if found is not None:
        return str(found.get("state", "stopped")), str(found.get("reason", ""))
    if speed is None:
        return "new", "no step has been made"
    return (speed.verdict, "") if speed.verdict else ("lost", "it ended without a word")


def _starts(run: RunDir) -> list[Mapping[str, Any]]:
    try:
        starts = json.loads(run.provenance.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    return [each for each in starts if isinstance(each, dict)] if isinstance(starts, list) else []


def _verdict(run: RunDir) -> tuple[str, float | None, Path | None]:
    """The last failure: its headline, when it was said, and the page of it."""
    if (when := _time_of(run.verdict)) is not None:
        return headline({"message": run.verdict.read_text(errors="replace")}), when, run.verdict
    failure = load(run.failure)
    return (headline(failure), _time_of(run.failure), None) if failure is not None else ("", None, None)


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def looked_up(wanted: Collection[str]) -> tuple[dict[str, Job], str]:
    """The jobs that the queue knows of, and what kept us from asking it: "" when nothing did."""
    if not wanted:
        return {}, ""
    try:
        return queue.jobs(wanted), ""
    except LaunchError as error:
        return {}, error.what
