"""How far the writing is, read from the sizes of the files: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardforge.core.units import bytes_, seconds

LOOK_S, LINE_S = 0.5, 10.0


@contextmanager
def shown(folder: Path, total: int, before: int, doing: str) -> Iterator[None]:
    """Show on stderr how the files below `folder` grow to `total` bytes; `before` of them were there already.

    `doing` is a word for it, like "upcycling".
    """
    over = threading.Event()
    paint, close = _bar(total, before, doing) if sys.stderr.isatty() else _lines(total, before)

    def look() -> None:
        while not over.wait(LOOK_S):
            paint(written(folder))

    watcher = threading.Thread(target=look, name="filling", daemon=True)
    watcher.start()
    try:
        yield
        paint(written(folder))
    finally:
        over.set()
        watcher.join()
        close()


def written(folder: Path) -> int:
    """Bytes of all files below a folder whose files come and go."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(place, name)).st_size
    return size


def _bar(total: int, before: int, doing: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(doing), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(doing, total=max(1, total), completed=before)
    bar.start()
    return lambda size: bar.update(task, completed=min(size, total)), bar.stop


def _lines(total: int, before: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    begun = last = time.monotonic()

    def paint(size: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_S:
            return
        last = now
        print(line(min(size, total), total, before, now - begun), file=sys.stderr, flush=True)

    return paint, lambda: None


class Counted:
    """The same for work that is counted in parts: called with how many are done, and of how many."""

    def __init__(self, doing: str):
        self.doing, self._last = doing, time.monotonic()
        self._bar: tuple[Callable[[int], None], Callable[[], None]] | None = None

    def __call__(self, done: int, parts: int) -> None:
        if sys.stderr.isatty():
            self._bar = self._bar or _parts(parts, self.doing)
            paint, close = self._bar
            paint(done)
            if done == parts:
                close()
        elif time.monotonic() - self._last >= LINE_S:
            self._last = time.monotonic()
            print(f"{self.doing}: {done} of {parts} parts", file=sys.stderr, flush=True)


def _parts(total: int, doing: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(doing, total=total)
    bar.start()
    return lambda done: bar.update(task, completed=done), bar.stop


def line(size: int, total: int, before: int, spent_s: float) -> str:
    """ "2.00 GiB of 8.00 GiB, 512 MiB/s, 12 s left"."""
    rate = (size - before) / spent_s if spent_s > 0 else 0.0
    left = f", {seconds((total - size) / rate)} left" if rate > 0 else ""
    return f"{bytes_(size)} of {bytes_(total)}, {bytes_(rate)}/s{left}"
