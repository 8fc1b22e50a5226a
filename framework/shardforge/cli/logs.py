"""`shardforge logs`: what a rank of a cluster run printed, or its job."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

HELP = "print what a run's job, or one of its ranks, has said; --follow goes on until Ctrl-C"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of the run")
    parser.add_argument("--rank", type=int, metavar="R", help="of this rank; default: of the job itself")
    parser.add_argument("--start", metavar="JOB.RESTART.TRY", help="of this attempt; default: the last one")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="how many of the last lines; 0 for all")
    parser.add_argument("--follow", action="store_true", help="go on with what comes, also of later attempts")


def run(args: argparse.Namespace) -> int:
    from shardforge.core.rundir import RunDir
    from shardforge.launch.logs import find, follow, last
    from shardforge.launch.overview import expect_run

    expect_run(args.run)
    run_dir = RunDir(args.run)
    log = find(run_dir, args.rank, args.start)
    print(f"== {log.path}", flush=True)
    lines, offset = last(log, args.lines)
    for line in lines:
        print(line)
    if not args.follow:
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        for line in follow(lambda: find(run_dir, args.rank, args.start), log, offset, lambda: time.sleep(0.5)):
            print(line, flush=True)
    return 0
