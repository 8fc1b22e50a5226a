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
from pathlib import Path
from typing import Any

from shardforge.checkpoint import building, index, tensorfile
from shardforge.checkpoint.journal import Journal
from shardforge.convert import certificate
from shardforge.convert import proof as proofs
from shardforge.convert.format import Options
from shardforge.convert.lockstep import Seen
from shardforge.convert.plan import Opener, Plan, begin, design, identity, write
from shardforge.core.errors import CheckpointError
from shardforge.core.workers import Workers, cores
from shardforge.families.open import open_source
from shardforge.families.source import Source

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
    opener: Opener = open_source,
) -> Converted:
    """Make `target` of the checkpoint in `path`, or find it made. `processes` defaults to all cores; `proof` and
    `bisect` are as for `convert.proof.prove`, which tells `proving` how far it is.

    Problems or CheckpointError for what the format cannot say, for what is in the way, and for a proof that fails:
    then there is no target. The source is only read.
    """
    building.apart(path, target)
    options = replace(options, target=target.absolute())
    source = opener(path)
    before = certificate.files(source.path)
    writer = design(source, options)
    same = identity(source, options, writer)
    work = target.with_name(f".{target.name}.partial")
    if _there(target):
        found = _same(target, same)
        shutil.rmtree(work, ignore_errors=True)  # of a process killed after its last rename
        return Converted(target, found, fresh=False)
    proofs.foresee(source, proof)
    with building.told(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with building.claimed(work, target, same, "conversion"):
            made = Plan(path, opener, writer, Journal(work, work / FILES))
            begun = time.perf_counter()
            records = _write(made, processes or cores(), progress)
            writing = time.perf_counter() - begun
            writer.finish(made.journal.files, _said(records))
            found = {"identity": same, **certificate.collect(source, writer, records, made.journal.files, options.to)}
            cast = any(each["cast"] for each in found["tensors"])
            opened = writer.opened(made.journal.files)
            proved = proofs.prove(source.path, opened, how=proof, cast=cast, bisect=bisect, opener=opener, seen=proving)
            found["proof"] = proved.plain()
            _unchanged(source, before)
            certificate.save(made.journal.files, found)
            _commit(made.journal.files, target)
            shutil.rmtree(work)
    return Converted(target, found, fresh=True, writing_s=writing)


def _there(target: Path) -> bool:
    """Whether something stands in the place of the result; an empty folder does not count."""
    return target.exists() and any(target.iterdir())


def _same(target: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate of a target of the same source and options; CheckpointError for anything else."""
    if not (target / certificate.NAME).is_file():
        names = ", ".join(sorted(path.name for path in target.iterdir())[:4])
        raise CheckpointError(f"this folder holds something else: {names}", target, "choose an empty or a new folder")
    found = certificate.read(target)
    if found["identity"] != now:
        raise CheckpointError(
            f"another conversion is here:\n{index.shorten(building.differences(found['identity'], now))}",
            target,
            "choose another folder, or delete this one to make it anew",
        )
    return found


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
