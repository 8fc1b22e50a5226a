"""A checkpoint of one program becomes a checkpoint of another. Killed at any moment, the same call goes on.

TARGET/                what the format has, and conversion.json; it appears at once, by one rename, as the last thing
.TARGET.partial/       while unfinished, beside it
  plan.json, lock      what is made here, and by one call at a time
  job-00000.json       a record of each finished file
  files/               what will be TARGET

Nothing depends on who did what: same options, same source, same tensors.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from shardforge.checkpoint import building, index, tensorfile
from shardforge.checkpoint.journal import Journal
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.convert import certificate
from shardforge.convert import proof as proofs
from shardforge.convert.format import Options
from shardforge.convert.lockstep import Seen
from shardforge.convert.plan import Opener, Plan, begin, design, identity, write
from shardforge.core.errors import CheckpointError
from shardforge.core.log import logger
from shardforge.core.units import bytes_
from shardforge.core.workers import Workers, cores
from shardforge.families import memory
from shardforge.families.open import open_source
from shardforge.families.source import Source

log = logger("convert")

FILES = "files"
PROCESS_BYTES = 1 << 28
"""Below this many a process more takes longer to start than it saves."""
Progress = Callable[[Path, int, int], Any]
"""(folder, bytes in all, bytes that were there already) -> a context manager that shows how the folder fills."""


@dataclass(frozen=True)
class Converted:
    path: Path
    certificate: dict[str, Any]
    fresh: bool  # False: it was there already
    proved: bool = False  # what was there
    writing_s: float = 0.0


def convert(
    path: Path,
    target: Path,
    options: Options,
    *,
    proof: proofs.How = "auto",
    bisect: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
    proving: Seen | None = None,
    opener: Opener | None = None,
) -> Converted:
    """Make `target` of the checkpoint in `path`, or find it made; then a proof that it lacks is made. `processes`
    defaults to all cores; `proof` and `bisect` are as for `convert.proof.prove`, which tells `proving` how far it is.
    `opener` is `families.open.open_source` unless given.

    Problems or CheckpointError for what the format cannot say, for what is in the way, and for a proof that fails:
    then there is no target. The source is only read.
    """
    target = _place(path, target)
    options = replace(options, target=target.absolute(), config=options.config and options.config.resolve())
    opener = opener or partial(open_source, config=options.config)
    source = opener(path)
    before = certificate.files(source.path)
    writer = design(source, options)
    same = identity(source, options, writer, before)
    work = target.with_name(f".{target.name}.partial")
    goal = _Goal(target, source, before, same, proof, bisect, partial(proofs.prove, opener=opener, seen=proving))
    with building.told(target):
        if _there(target):
            return _found(goal, work)
        proofs.foresee(source, proof)
        target.parent.mkdir(parents=True, exist_ok=True)
        with building.claimed(work, target, same, "conversion"):
            if _there(target):  # another call was quicker
                return _found(goal, work)
            made = Plan(path, opener, writer, Journal(work, work / FILES))
            begun = time.perf_counter()
            records = _write(made, _processes(made, source, processes or cores()), progress)
            writing = time.perf_counter() - begun
            writer.finish(made.journal.files, _said(records))
            found = {"identity": same, **certificate.collect(source, writer, records, made.journal.files, options)}
            found["proof"] = goal.prove(made.journal.files, found)
            certificate.save(made.journal.files, found)
            _commit(made.journal.files, target)
            shutil.rmtree(work)
    return Converted(target, found, fresh=True, writing_s=writing)


@dataclass(frozen=True)
class _Goal:
    target: Path
    source: Source
    before: Mapping[str, tuple[int, int]]  # files of the source
    same: Mapping[str, Any]
    how: proofs.How
    bisect: bool
    proof: Callable[..., proofs.Proof]

    def prove(self, folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
        """The proof of a result that lies in `folder`, `found` its certificate."""
        asked = {"cast": certificate.cast(found), "kinds": certificate.kinds(found)}
        opened = folder / found["target"]["opens"]
        made = self.proof(self.source.path, opened, how=self.how, bisect=self.bisect, **asked)
        _unchanged(self.source, self.before)
        return made.plain()


def _place(path: Path, target: Path) -> Path:
    """Where the result is put by a rename in the end; CheckpointError for a place that no folder can be renamed to."""
    building.apart(path, target)
    if target.is_symlink():
        target = target.resolve()
    if target.resolve() == Path.cwd():
        what = "this is the folder that the command runs in, and the result takes the place of its target"
    elif target.is_mount():
        what = "this is where a disk is mounted, and the result is one folder that appears at once"
    else:
        return target
    raise CheckpointError(what, target, f"name a folder in it: {target / 'converted'}")


def _there(target: Path) -> bool:
    """Whether something stands in the place of the result; an empty folder does not count."""
    return target.exists() and any(target.iterdir())


def _found(goal: _Goal, work: Path) -> Converted:
    """What is made already, proved now where it was not."""
    target, found = goal.target, _same(goal.target, goal.same)
    anew = proofs.lacks(found["proof"], goal.how, goal.bisect)
    if anew:
        found["proof"] = goal.prove(target, found)
        certificate.save(target, found)
    shutil.rmtree(work, ignore_errors=True)  # of a process killed after its last rename
    return Converted(target, found, fresh=False, proved=anew)


def _same(target: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a target of the same source and options; CheckpointError for anything else."""
    if not (target / certificate.NAME).is_file():
        names = ", ".join(sorted(path.name for path in target.iterdir())[:4])
        raise CheckpointError(f"this folder holds something else: {names}", target, "choose an empty or a new folder")
    found = certificate.read(target)
    if found["identity"] != now:
        lines = building.differences(found["identity"], now)
        others = [line for line in lines if not line.startswith("source.")]
        why = "another conversion is here" if others else "this was made of another source, or before this one changed"
        fix = "choose another folder, or delete this one to make it anew"
        raise CheckpointError(f"{why}:\n{index.shorten(lines)}", target, fix)
    if lines := certificate.changed(target, found):
        what = f"this was made here, and is not whole any more:\n{index.shorten(lines)}"
        raise CheckpointError(what, target, "choose another folder, or delete this one to make it anew")
    return found


def _processes(made: Plan, source: Source, wanted: int) -> int:
    """As many as memory holds, each with two of the largest tensors; of what is fused in a file that is all of it."""
    sizes = {name: prod(info.shape) * TYPES[info.dtype][0].itemsize for name, info in source.names.items()}
    items = (item for file in made.writer.files for item in file.items)
    largest = max((max(item.bytes, sum(sizes[name] for name in item.ours)) for item in items), default=1)
    free = memory.free()
    if (most := max(1, free // (2 * max(1, largest)))) < wanted:
        log.info("%s processes: memory has %s left, each needs %s", most, bytes_(free), bytes_(2 * largest))
    return min(wanted, most)


def _write(made: Plan, processes: int, progress: Progress | None) -> list[dict[str, Any]]:
    """Do what is not done; the records of all files."""
    folder, files = made.journal.files, made.writer.files
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor(processes, "convert-kept") as threads:
        done = list(threads.map(made.journal.finished, range(len(files))))
    kept = {job for job, record in enumerate(done) if record}
    names = {files[job].name for job in kept}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()
    left = [job for job in range(len(files)) if job not in kept]
    needed, there = sum(files[job].bytes for job in left), sum(files[job].bytes for job in kept)
    building.room(needed, folder, "or choose another disk, or --dtype bf16")
    count = max(1, min(processes, len(left), 1 + needed // PROCESS_BYTES))
    shown = progress(folder, needed + there, there) if progress else nullcontext()
    with shown, Workers(count, "shardforge convert", "--processes", partial(begin, made)) as pool:
        for _ in pool.run(write, left):
            pass
    records = [made.journal.read(job) for job in range(len(files))]
    assert all(records), "a job left no record"
    return [record for record in records if record]


def _said(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {record["files"][0]["file"]: record["said"] for record in records}


def _unchanged(source: Source, before: Mapping[str, tuple[int, int]]) -> None:
    """CheckpointError when somebody wrote to the source while it was read."""
    after = certificate.files(source.path)
    if changed := [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        what = f"{', '.join(changed[:4])} changed while it was read"
        raise CheckpointError(what, source.path, "convert again when nobody writes there")


def _commit(folder: Path, target: Path) -> None:
    """The one moment at which the result appears. An empty folder in its place goes; anything else stays."""
    for path in sorted(path for path in [folder, *folder.rglob("*")] if path.is_dir()):
        tensorfile.settle_folder(path)
    os.rename(folder, target)
    tensorfile.settle_folder(target.parent)
