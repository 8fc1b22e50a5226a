"""A folder of tensors that processes make: apart from its source, with room on the disk, for one call at a time.

Whoever makes one keeps a work folder beside it, with the plan and a lock, until it is whole.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardforge.checkpoint import index, tensorfile
from shardforge.checkpoint.crew import explained
from shardforge.core.errors import CheckpointError, ForgeError
from shardforge.core.units import bytes_
from shardforge.recipe.provenance import leaves

PLAN, LOCK = "plan.json", "lock"


def apart(path: Path, output: Path) -> None:
    """CheckpointError unless neither folder lies in the other."""
    one, other = path.resolve(), output.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise CheckpointError(
            f"the source {path} and the output {output} lie in one another", output, "choose a folder beside it"
        )
    if output.exists() and not output.is_dir():
        raise CheckpointError("this is a file, not a folder", output, "choose another output folder")


def room(needed: int, folder: Path, fix: str) -> None:
    """CheckpointError when the disk of `folder` cannot hold `needed` bytes more."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        what = f"the result needs {bytes_(needed)} and the disk has {bytes_(free)} left"
        raise CheckpointError(what, folder, f"free space there, {fix}")


@contextmanager
def claimed(work: Path, output: Path, same: Mapping[str, Any], name: str) -> Iterator[None]:
    """Hold the work folder of `output` for this process alone. `same` is what the result depends on, as JSON;
    CheckpointError when another process is there, or an unfinished one (`name` says of what) that depends on else."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise CheckpointError("another process is writing here", output, "wait for it, or stop it first") from cause
        planned = work / PLAN
        if planned.is_file() and (was := _planned(planned, name, work)) != same:
            raise CheckpointError(
                f"an unfinished {name} with other options is here:\n{index.shorten(differences(was, same))}",
                work,
                "finish it with its own options, delete the folder, or choose another output",
            )
        tensorfile.write_whole(planned, json.dumps(same).encode())
        yield


def _planned(path: Path, name: str, work: Path) -> dict[str, Any]:
    """What an unfinished one depends on."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as cause:
        found = cause
    if not isinstance(found, dict):
        told = found if isinstance(found, Exception) else f"it holds a {type(found).__name__}"
        what = f"the plan of an unfinished {name} cannot be read: {told}"
        raise CheckpointError(what, path, f"delete the folder {work}, in which nothing is whole, and start again")
    return found


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Two results' `same`, a line for each leaf that differs."""
    old, new = leaves(dict(was)), leaves(dict(now))
    fields = dict.fromkeys([*old, *new])
    return [
        f"{field.removeprefix('options.')}: {old.get(field, 'absent')} there, {new.get(field, 'absent')} here"
        for field in fields
        if old.get(field) != new.get(field)
    ]


@contextmanager
def told(output: Path) -> Iterator[None]:
    """What goes wrong with the disk inside becomes a CheckpointError with a next step."""
    try:
        yield
    except ForgeError:
        raise
    except OSError as cause:
        raise explained(cause, output) from cause
