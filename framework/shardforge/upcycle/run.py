"""A dense source becomes a folder that training starts from. Killed at any moment, the same call goes on.

OUTPUT/
  recipe.yaml                  the model, ready to be trained; data to be named
  upcycle.yaml                 the options, for --config
  report.json, report.html     what was changed, by layer and matrix
  checkpoints/step-00000000/   the weights; while unfinished step-00000000.tmp-0/
  .upcycle/                    while unfinished: plan, lock, and a record of each finished layer

Nothing depends on who did what: same options, same source, same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardforge.checkpoint import building, folders, index, tensorfile
from shardforge.core.errors import CheckpointError, Problems
from shardforge.core.rundir import RunDir
from shardforge.core.workers import Workers, cores
from shardforge.families.open import open_source
from shardforge.upcycle import ready, report
from shardforge.upcycle.make import make
from shardforge.upcycle.options import Given, dump
from shardforge.upcycle.plan import Opener, Plan, identity, plan
from shardforge.upcycle.source import mismatches
from shardforge.upcycle.target import Target, target

WORK, OPTIONS = ".upcycle", "upcycle.yaml"
Progress = Callable[[Path, int, int], Any]
"""(folder, bytes in all, bytes that were there already) -> a context manager that shows how the folder fills."""


@dataclass(frozen=True)
class Upcycled:
    path: Path
    step: Path  # the step folder
    report: dict[str, Any]
    target: Target
    fresh: bool  # False: it was there already


def upcycle(
    path: Path,
    output: Path,
    given: Given,
    *,
    processes: int | None = None,
    data: Sequence[str] = (),
    progress: Progress | None = None,
    opener: Opener = open_source,
) -> Upcycled:
    """Make `output` of the dense model in `path`, or find it made. `processes` defaults to all cores.

    Problems for options that do not fit the source, CheckpointError for what is in the way in `output`.
    """
    building.apart(path, output)
    source = opener(path)
    where = str(path)
    if problems := list(mismatches(source, where)):
        raise Problems(problems, "the source")
    if given.options.moments == "carry" and not source.moments:
        what = "the source has no optimizer state to carry"
        raise CheckpointError(what, given.where("moments"), "moments: drop, or name a checkpoint that training saved")
    goal = target(source.model, given, where)
    same = identity(source, given.options)
    step = RunDir(output).checkpoints / folders.name(0)
    if (step / folders.MARKER).is_file():
        found = _same(output, folders.read_manifest(step)["extra"]["upcycle"], same)
        shutil.rmtree(output / WORK, ignore_errors=True)  # of a process killed after its last write
        return Upcycled(output, step, found, goal, fresh=False)
    with _claimed(output, same) as work:
        attempt = step.with_name(f"{step.name}.tmp-0")
        if step.is_dir():
            step.rename(attempt)  # killed just before the marker
        attempt.mkdir(parents=True, exist_ok=True)
        made = plan(source, opener, given.options, goal, attempt, work, path)
        there = sum(path.stat().st_size for path in attempt.iterdir() if path.is_file())
        needed = sum(made.bytes(job) for job in made.jobs) - there
        building.room(needed, output, "choose another disk, or fewer experts or dtype: bf16")
        with building.told(output):
            kept = _write(made, processes or cores(), progress)
            found = _commit(made, output, same, given, data, kept)
    return Upcycled(output, step, found, goal, fresh=True)


def _write(made: Plan, processes: int, progress: Progress | None) -> int:
    """Do what is not done; the number of jobs that were."""
    expected = {file for job in made.jobs for file, _ in made.files(job)}
    for path in made.folder.iterdir():
        if path.name not in expected:
            path.unlink()
    kept = [job for job in made.jobs if made.journal.finished(job)]
    left = [job for job in made.jobs if job not in kept]
    total = sum(made.bytes(job) for job in made.jobs)
    for job in left:
        for file, _ in made.files(job):
            (made.folder / file).unlink(missing_ok=True)
    shown = progress(made.folder, total, sum(made.bytes(job) for job in kept)) if progress else nullcontext()
    with shown, Workers(min(processes, len(left) or 1), "shardforge upcycle", "--processes") as pool:
        for _ in pool.run(partial(make, plan=made), left):
            pass
    return len(kept)


def _commit(
    made: Plan, output: Path, same: dict[str, Any], given: Given, data: Sequence[str], kept: int
) -> dict[str, Any]:
    """After all files: index, recipe, report, and last the marker."""
    records = [made.journal.read(job) for job in made.jobs]
    assert all(records), "a job left no record"
    table = made.folder / index.NAME
    tensorfile.write_whole(table, index.to_json(made.entries()))
    files = [file for record in records if record for file in record["files"]]
    files.append({"file": table.name, "bytes": table.stat().st_size, "sha256": tensorfile.sha256(table)})
    found = report.collect(made, [record["report"] for record in records if record and record["report"]])
    tensorfile.write_whole(output / OPTIONS, dump(given.options).encode())
    tensorfile.write_whole(RunDir(output).recipe, ready.recipe(output, made.target, given.options, data).encode())
    report.save(output, found)
    manifest = {
        "step": 0,
        "describe": {"model": made.described()},
        "extra": {"upcycle": same},
        "files": files,
    }
    folders.commit(made.folder, 0, manifest)
    shutil.rmtree(made.journal.path)
    return found


def _same(output: Path, was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The report of an output of the same source and options; CheckpointError says what differs."""
    if was != now:
        raise CheckpointError(
            f"another upcycling is here:\n{index.shorten(building.differences(was, now))}",
            output,
            "choose another output folder, or delete this one to make it anew",
        )
    return report.read(output)


@contextmanager
def _claimed(output: Path, same: dict[str, Any]) -> Iterator[Path]:
    """The work folder, for this process alone, of this very upcycling."""
    work = output / WORK
    if output.is_dir() and not work.is_dir() and any(output.iterdir()):
        names = ", ".join(sorted(path.name for path in output.iterdir())[:4])
        raise CheckpointError(f"this folder holds something else: {names}", output, "choose an empty or a new folder")
    with building.claimed(work, output, same, "upcycling"):
        yield work
