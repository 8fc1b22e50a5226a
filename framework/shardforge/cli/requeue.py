"""`shardforge requeue`: a run goes back to the queue, or is submitted again as it was."""

from __future__ import annotations

import argparse
import getpass
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.core.rundir import RunDir

HELP = "save a run and put its job back into the queue; submit its script again when its job is gone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of the run")
    parser.add_argument(
        "--now", action="store_true", help="requeue at once: what was trained since the last checkpoint is done again"
    )


def run(args: argparse.Namespace) -> int:
    from shardforge.cli.status import look
    from shardforge.core.errors import LaunchError
    from shardforge.core.rundir import RunDir
    from shardforge.launch.overview import expect_run

    run_dir = RunDir(args.run)
    expect_run(args.run)
    [seen], problem = look([args.run])
    if problem:
        raise LaunchError(f"the queue is not known: {problem}", args.run, "ask on a login node of the cluster")
    if job := next((job for job in seen.jobs if job.runs), None):
        print(_running(run_dir, job.id, job.number, args.now))
    elif seen.jobs:
        print("\n".join(_waiting(job.id, job.held, job.reason) for job in seen.jobs))
    elif seen.owner:
        fix = f"shardforge stop {args.run}, then shardforge train {args.run}"
        raise LaunchError(f"it is no job of Slurm but {seen.owner}", args.run, fix)
    elif seen.state == "finished":
        raise LaunchError(
            "all of its steps are done", args.run, "shardforge launch with a larger budget goes on with it"
        )
    else:
        print(again(run_dir))
    return 0


def _running(run_dir: RunDir, job: str, number: str, now: bool) -> str:
    from shardforge.launch import history, queue

    if now:
        queue.requeue(number)
        return f"job {job} is requeued"
    history.put(run_dir.stop, f"requeue asked by {getpass.getuser()}")
    return f"asked by {run_dir.stop}: job {job} saves after its step and goes back to the queue"


def _waiting(job: str, held: bool, reason: str) -> str:
    from shardforge.launch import queue

    if not held:
        return f"job {job} is in the queue already: {reason or 'it waits'}"
    queue.release(job)
    return f"job {job} was held, and is released"


def again(run_dir: RunDir) -> str:
    """Submit the script of the last submission once more, as it was, and record it."""
    from shardforge.core.errors import LaunchError
    from shardforge.launch import history, queue
    from shardforge.launch.overview import submissions

    before = submissions(run_dir)
    if not before or not run_dir.script.is_file():
        fix = "shardforge launch RECIPE --cluster NAME submits it, shardforge train RECIPE trains it here"
        raise LaunchError("this run was never submitted to Slurm", run_dir.path, fix)
    last = before[-1]
    _, _, index = str(last["job"]).partition("_")
    run_dir.stop.unlink(missing_ok=True)  # asking for a start takes an earlier wish to stop back
    number = queue.submit(run_dir.script, [f"--array={index}"] if index else [])
    job = f"{number}_{index}" if index else number
    kept = {name: value for name, value in last.items() if name != "chain"}
    history.append(run_dir.jobs, kept | {"job": job, "time": time.time()})
    return f"job {job} submitted, with the script of job {last['job']}"
