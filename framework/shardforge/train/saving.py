"""A run that ends with an error lets a save in flight come to its end: what is whole on all ranks is committed.

What is not whole never is: the marker that commits a checkpoint is written after all ranks have agreed on theirs.
"""

from __future__ import annotations

import threading
import time

from shardforge.checkpoint.store import WRITER
from shardforge.core.log import logger
from shardforge.train.failure import Failure

SHORT_S, LONG_S = 5.0, 120.0
"""Patience with a save that waits for a rank which is gone or frozen, and with one that all ranks work on."""

log = logger("train")


def finish(failure: Failure) -> None:
    """Wait for the background save of this rank, if there is one, as long as `failure` leaves hope."""
    writing = [each for each in threading.enumerate() if each.name.startswith(WRITER)]
    if not writing or failure.cause == "interrupted":
        return
    log.info("waiting for the save of step %s", writing[0].name.removeprefix(WRITER))
    until = time.monotonic() + (SHORT_S if failure.cause in ("dead", "frozen", "lost") else LONG_S)
    for each in writing:
        each.join(max(0.0, until - time.monotonic()))
