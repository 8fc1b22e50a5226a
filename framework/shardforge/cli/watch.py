"""shardforge watch RUN_DIR"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardforge.observe.base import Observer

HELP = "attach the live display to a run that is going on; Ctrl-C leaves the run alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of the run")


def run(args: argparse.Namespace) -> int:
    from shardforge.observe.progress import display

    with contextlib.suppress(KeyboardInterrupt):
        attach(args.run, display())
    return 0


def attach(path: Path, observer: Observer, wait: Callable[[], None] = lambda: time.sleep(0.5)) -> None:
    """Tell `observer` all that happened in the run and all that goes on to happen, until the run has ended.

    `wait` is called when there is no news. However this ends, the observer's display is closed.
    """
    from shardforge.core.rundir import RunDir
    from shardforge.observe.jsonl import Tail, replay
    from shardforge.observe.report import check

    check(RunDir(path))
    tail = Tail(RunDir(path).metrics)
    close = getattr(observer, "close", lambda: None)
    ended = None
    try:
        while ended is None:
            for event in tail.new():
                # an earlier life may have ended and another gone on: only the last event tells
                ended = event if event["event"] == "end" else None
                if ended is None:
                    replay(event, observer, path)
            if ended is None:
                wait()
        replay(ended, observer, path)
    finally:
        close()
