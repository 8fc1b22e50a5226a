"""A pool of fresh processes for independent jobs, of which this one is the first: the others take seconds to start.

They end with their parent; a lost one is an error, not a hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import TypeVar

from shardforge.core.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 2
"""Jobs handed out per other process at a time: one that it does, and one that waits for it."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes, this one among them. `command` and its `option` for their number are for the
    message about one that was killed. `prepare` is called once in each process before its first job."""

    def __init__(
        self,
        count: int,
        command: str = "shardforge data build",
        option: str = "--workers",
        prepare: Callable[[], object] | None = None,
    ):
        self.count, self.command, self.option, self.prepare = count, command, option, prepare
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool:
            for process in list(self._pool._processes.values()) if error is not None else ():
                process.terminate()  # what they have not finished is made again
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """Results as they come, in any order. `function` must be importable by name."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core for each process
        others = max(0, min(self.count, len(jobs)) - 1)
        if others > 0 and self._pool is None:
            fresh = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count - 1, fresh, _begin, (self.prepare,))
        left, running = iter(jobs), set[Future[Result]]()
        try:
            self._hand_out(function, islice(left, AHEAD * others), running)
            if self.prepare:
                self.prepare()
            while True:
                for each in [each for each in running if each.done()]:
                    running.remove(each)
                    self._hand_out(function, islice(left, 1), running)
                    yield each.result()
                if own := list(islice(left, 1)):
                    yield function(own[0])
                elif running:
                    wait(running, return_when=FIRST_COMPLETED)
                else:
                    return
        except BrokenProcessPool as cause:
            raise DataError(
                f"one of {self.count} workers was killed, most likely for lack of memory",
                self.command,
                f"run it again with {self.option} {max(1, self.count // 2)}; what is finished is kept",
            ) from cause

    def _hand_out(self, function: Callable[[Job], Result], jobs: Iterable[Job], running: set[Future[Result]]) -> None:
        running |= {self._pool.submit(function, job) for job in jobs} if self._pool else set()


def _begin(prepare: Callable[[], object] | None) -> None:
    """First thing in a worker: leave Ctrl-C to the parent, end with the parent, and use one core."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if prepare:
        prepare()
