"""What a rank says when something goes wrong: one rank speaks, the others leave quietly, none hangs."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Protocol

import psutil
import torch.distributed as dist

from shardforge.core import log
from shardforge.core.errors import EngineError, ForgeError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train.lock import Occupied
from shardforge.train.verdict import AGAIN, spot
from shardforge.train.world import FailedThere

MISTAKE, CRASH, INTERRUPTED = 2, 1, 130
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "Socket Timeout")
LOST += ("Application timeout caused pair closure", "connectFullMesh failed", "was aborted", "remote process exited")
"""What gloo and NCCL say when another rank is gone, or does not come."""


class Witness(Protocol):
    """What knows of the other ranks; see pulse.Heart."""

    def lost(self, error: BaseException) -> str | None:
        """What is to be said of a collective that failed; "" when another rank says it, None when nothing is known."""
        ...

    def tell(self, code: int, text: str) -> None:
        """Let the others leave too."""
        ...


class Alone:
    """The witness of a process without others."""

    def lost(self, error: BaseException) -> str | None:
        return None

    def tell(self, code: int, text: str) -> None:
        pass


def guarded(run_dir: RunDir, layout: Layout, work: Callable[[], int], witness: Witness | None = None) -> int:
    """work()'s exit code; a failure becomes a message from the first rank that met one, and an exit code."""
    witness = witness or Alone()
    try:
        return work()
    except Occupied as error:  # met by all ranks alike, and the directory is not ours to write into
        if log.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt:
        text, code = "interrupted; the last committed checkpoint is what a new start goes on from", INTERRUPTED
    except Exception as error:
        text, code = _told(run_dir, layout, witness, error)
    if text:
        speak(run_dir, text)
        witness.tell(code, text)
    return code


def _told(run_dir: RunDir, layout: Layout, witness: Witness, error: Exception) -> tuple[str, int]:
    """What to say of an error, nothing when another rank says it, and the exit code."""
    collective = next((cause for cause in _causes(error) if _is_loss(cause)), None)
    if collective is not None:
        found = witness.lost(collective)
        return f"error: {_unexplained(run_dir, layout)}" if found is None else found, CRASH
    if isinstance(error, ForgeError):
        return f"error: {error}", MISTAKE
    rank, trace = (error.rank, error.trace) if isinstance(error, FailedThere) else (log.rank(), traceback.format_exc())
    return f"rank {rank} ({spot(layout, rank)}) failed:\n{trace}", CRASH


def _unexplained(run_dir: RunDir, layout: Layout) -> EngineError:
    return EngineError(
        f"rank {log.rank()} ({spot(layout, log.rank())}) lost contact with another rank in a collective",
        run_dir.path,
        f"look for what ended that process (memory, a signal, its node) and {AGAIN}",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_loss(error: BaseException) -> bool:
    """Whether this is what a collective says when another rank is gone."""
    if isinstance(error, (dist.DistNetworkError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST)


def speak(run_dir: RunDir, text: str) -> None:
    """Print, unless another rank of this start has spoken before."""
    said = {"start": start_id(), "time": time.time(), "rank": log.rank(), "pid": os.getpid(), "message": text}
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        with open(run_dir.failure, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if _of_this_start(file.read()):
                return
            file.truncate(0)
            json.dump(said, file)
    except OSError:
        if log.rank() != 0:
            return
    print(text, file=sys.stderr, flush=True)


def _of_this_start(text: str) -> bool:
    """Whether a rank of this start wrote `text`. A name alone can come again: a port, a process number."""
    try:
        said = json.loads(text)
        return said["start"] == start_id() and said["time"] >= psutil.Process().create_time()
    except (ValueError, KeyError, TypeError):
        return False


def start_id() -> str:
    """The same on all ranks of one start, mostly another at the next."""
    names = ("SHARDFORGE_START", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    names += ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    found = [os.environ[name] for name in names if name in os.environ]
    return "-".join(found) if "RANK" in os.environ else f"pid-{os.getpid()}"
