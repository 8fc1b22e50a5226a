"""`shardforge status`: where runs are, how fast they go, and what became of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.launch.overview import Overview

HELP = "say where runs are: queue, step, speed, time left, restarts, last checkpoint, last verdict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN_DIR", help="run directories, or folders of them; default runs/"
    )
    parser.add_argument(
        "--all", nargs="?", const=Path("runs"), type=Path, metavar="FOLDER", help="one line for each run below a folder"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead")


def run(args: argparse.Namespace) -> int:
    from shardforge.launch import status

    roots = [*args.runs, *([args.all] if args.all else [])] or [Path("runs")]
    paths = _found(roots)
    seen, problem = look(paths)
    if args.json:
        print(status.as_json(seen))
        return 0
    if args.runs and not args.all and paths == args.runs:
        pages = [status.page(closer(each), time.time()) for each in seen]
        print("\n\n".join("\n".join(page) for page in pages))
    else:
        print("\n".join(status.table(seen, time.time())))
    if problem:
        print(f"the queue is not known: {problem}")
    return 0


def _found(roots: Sequence[Path]) -> list[Path]:
    from shardforge.core.errors import LaunchError, Problems
    from shardforge.launch.overview import runs_below

    found, problems = [], []
    for root in roots:
        below = list(runs_below(root))
        found += below
        if not below:
            what = "no run is below this folder" if root.is_dir() else "there is no such folder"
            problems.append(LaunchError(what, root, "name run directories such as runs/first, or --all FOLDER"))
    if problems:
        raise Problems(problems, "the runs to look at") if len(problems) > 1 else problems[0]
    return list(dict.fromkeys(found))


def look(paths: Sequence[Path]) -> tuple[list[Overview], str]:
    """What is known of each run, and why the queue is not; one question to the queue for all of them."""
    from shardforge.core.rundir import RunDir
    from shardforge.launch import queue
    from shardforge.launch.overview import job_ids, last_job, looked_up, overview
    from shardforge.train import lock

    runs = [RunDir(path) for path in paths]
    known, problem = looked_up({each for run in runs for each in job_ids(run)})
    fates = queue.ended({job for run in runs if (job := last_job(run)) and job not in known})
    owners = [owner if (owner := lock.owner(run.lock)) and owner.alive else None for run in runs]
    told = [f"process {owner.pid} on {owner.host}" if owner else "" for owner in owners]
    return [overview(run, known, fates, owner) for run, owner in zip(runs, told, strict=True)], problem


def closer(seen: Overview) -> Overview:
    """With what only scontrol says of its job."""
    from dataclasses import replace

    from shardforge.launch import queue

    if not seen.jobs:
        return seen
    found = next(iter(queue.details(seen.jobs[0].number)), {})
    return replace(seen, excluded=queue.known(found.get("ExcNodeList", "")))
