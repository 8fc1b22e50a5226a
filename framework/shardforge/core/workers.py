"""A pool of fresh processes for independent jobs. It ends with its parent; a lost worker is an error, not a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from types import TracebackType
from typing import TypeVar

from shardforge.core.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 4
"""Jobs handed out per worker at a time; bounds what waits in memory."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes, or this one alone when count is 1. `command` and its `option` for their number are for the
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
        if self.count == 1 or len(jobs) < 2:
            if self.prepare:
                self.prepare()
            yield from map(function, jobs)
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), _begin, (self.prepare,))
        left = iter(jobs)
        try:
            running = {self._pool.submit(function, job) for job in islice(left, AHEAD * self.count)}
            while running:
                done: Future[Result] = next(as_completed(running))
                running.remove(done)
                running |= {self._pool.submit(function, job) for job in islice(left, 1)}
                yield done.result()
        except BrokenProcessPool as cause:
            raise DataError(
                f"one of {self.count} workers was killed, most likely for lack of memory",
                self.command,
                f"run it again with {self.option} {max(1, self.count // 2)}; what is finished is kept",
            ) from cause


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
