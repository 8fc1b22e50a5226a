"""The job's store, asked by a thread of its own: from a host that hangs an answer may never come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Unreachable(Exception):
    """The store does not answer; str() is what is known of it."""


class Board:
    """The job's store, with the keys of one start."""

    def __init__(self, store: dist.Store, start: str):
        self._store = dist.PrefixStore(f"shardforge/{start}", store.clone())  # a connection of its own
        self._asked: SimpleQueue[tuple[Callable[[dist.Store], object], Future] | None] = SimpleQueue()
        self._last: Future | None = None
        self._gone = False
        threading.Thread(target=self._serve, name="shardforge-store", daemon=True).start()

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            work, answer = asked
            try:
                answer.set_result(work(self._store))
            except RuntimeError as cause:
                answer.set_exception(cause)

    def ask(self, work: Callable[[dist.Store], T], patience_s: float) -> T:
        """work(store), or Unreachable when it takes longer than the given time or fails."""
        if self._gone:
            raise Unreachable("is gone")
        try:
            if self._last is not None:
                self._last.exception(patience_s)
            self._last = answer = Future()
            self._asked.put((work, answer))
            return answer.result(patience_s)
        except TimeoutError:
            raise Unreachable("does not answer") from None
        except RuntimeError:
            self._gone = True
            raise Unreachable("is gone") from None

    def close(self) -> None:
        self._asked.put(None)
