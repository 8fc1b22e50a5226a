"""`shardforge stop`: a run saves and stops, wherever it runs, and does not come back by itself."""

from __future__ import annotations

import argparse
import getpass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.core.rundir import RunDir

HELP = "ask a run to save and stop, and take its jobs that wait out of the queue"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of the run")


def run(args: argparse.Namespace) -> int:
    from shardforge.cli.status import look
    from shardforge.core.rundir import RunDir
    from shardforge.launch import history
    from shardforge.launch.overview import expect_run, job_ids

    run_dir = RunDir(args.run)
    expect_run(args.run)
    cancelled = cancel(run_dir)
    if cancelled:
        print(f"cancelled {', '.join(cancelled)}")
    [seen], problem = look([args.run])  # after that: a job may have begun in between
    blind = bool(problem and job_ids(run_dir)) and seen.state != "finished"
    if seen.owner or any(job.runs for job in seen.jobs) or blind:
        history.put(run_dir.stop, f"asked by {getpass.getuser()}")
        print(f"asked to stop, by {run_dir.stop}: it saves after its step, ends, and does not come back by itself")
    elif not cancelled:
        print(f"nothing of it runs or waits: {seen.state}" + (f" ({seen.why})" if seen.why else ""))
    if problem:
        print(f"the queue is not known, jobs that wait stay in it: {problem}")
    return 0


def cancel(run_dir: RunDir) -> list[str]:
    """Take the jobs of a run that wait out of the queue; a word on each."""
    from shardforge.launch import queue
    from shardforge.launch.overview import job_ids, looked_up

    ids = job_ids(run_dir)
    known, _ = looked_up(ids)
    waiting = [each for each in ids if each in known and known[each].waits]
    if waiting:
        queue.cancel(waiting)
    return [f"job {each} ({known[each].state})" for each in waiting]
