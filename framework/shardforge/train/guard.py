"""What a rank says when something goes wrong: one rank speaks, the others leave quietly, none hangs."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Protocol

import psutil
import torch.distributed as dist

from shardforge.checkpoint.tensorfile import write_whole
from shardforge.core import log
from shardforge.core.errors import EngineError, ForgeError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train import saving
from shardforge.train.failure import INTERRUPTED, MISTAKE, Blamed, Failure, broken_hardware, node_name, record
from shardforge.train.lock import Occupied
from shardforge.train.place import stack_in, step_of
from shardforge.train.verdict import AGAIN, spot
from shardforge.train.world import FailedThere, Unmet

LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "Socket Timeout")
LOST += ("Application timeout caused pair closure", "connectFullMesh failed", "was aborted", "remote process exited")
"""What gloo and NCCL say when another rank is gone, or does not come."""


class Witness(Protocol):
    """What knows of the other ranks; see pulse.Heart."""

    def lost(self, error: BaseException) -> Failure | None:
        """What is to be said of a collective that failed; no text when another rank says it, None when nothing is
        known."""
        ...

    def tell(self, failure: Failure) -> None:
        """Let the others leave too."""
        ...


class Alone:
    """The witness of a process without others."""

    def lost(self, error: BaseException) -> Failure | None:
        return None

    def tell(self, failure: Failure) -> None:
        pass


def guarded(run_dir: RunDir, layout: Layout, work: Callable[[], int], witness: Witness | None = None) -> int:
    """work()'s exit code; a failure becomes a message from the first rank that met one, and an exit code."""
    witness = witness or Alone()
    try:
        return work()
    except Occupied as error:  # met by all ranks alike, and the directory is not ours to write into
        if log.rank() == 0:
            refused(run_dir, error.owner)
            print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except KeyboardInterrupt as error:
        text = "interrupted; the last committed checkpoint is what a new start goes on from"
        failure = Failure(text=text, code=INTERRUPTED, cause="interrupted", step=step_of(stack_in(error)))
    except Exception as error:
        failure = _told(run_dir, layout, witness, error)
    if failure.text:
        speak(run_dir, failure)
        witness.tell(failure)
    saving.finish(failure)
    return failure.code


def _told(run_dir: RunDir, layout: Layout, witness: Witness, error: Exception) -> Failure:
    """What to say of an error, without text when another rank says it."""
    step = step_of(stack_in(error))
    if isinstance(error, Unmet):
        return Failure(text=f"error: {error}")
    collective = next((cause for cause in _causes(error) if _is_loss(cause)), None)
    if collective is not None:
        unknown = Failure(text=f"error: {_unexplained(run_dir, layout)}", step=step)
        return witness.lost(collective) or unknown
    if isinstance(error, ForgeError):
        return Failure(text=f"error: {error}", code=MISTAKE, cause="mistake", step=step)
    rank, trace = (error.rank, error.trace) if isinstance(error, FailedThere) else (log.rank(), traceback.format_exc())
    text, here = f"rank {rank} ({spot(layout, rank)}) failed:\n{trace}", rank == log.rank()
    return Failure(
        text=text,
        cause="error",
        step=step,
        blamed=(Blamed(rank, node_name(), "failed"),) if here else (),
        node=node_name() if here and broken_hardware(trace) else None,
    )


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


def speak(run_dir: RunDir, failure: Failure) -> None:
    """Print, and write failure.json and verdict.txt, unless another rank of this start has spoken before."""
    try:
        run_dir.path.mkdir(parents=True, exist_ok=True)
        with open(run_dir.failure, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if _of_this_start(file.read()):
                return
            file.truncate(0)
            json.dump(record(failure, start_id(), log.rank()), file)
            write_whole(run_dir.verdict, f"{failure.text.rstrip()}\n{failure.page}".encode())
    except OSError:
        if log.rank() != 0:
            return
    print(failure.text, file=sys.stderr, flush=True)


def refused(run_dir: RunDir, owner: str) -> None:
    """Tell the launcher of this start, if one has named it, that another run has the directory."""
    start = os.environ.get("SHARDFORGE_START")
    if start and run_dir.launch.is_dir():
        with suppress(OSError):
            write_whole(run_dir.occupied(start), json.dumps({"start": start, "owner": owner}).encode() + b"\n")


def _of_this_start(text: str) -> bool:
    """Whether a rank of this start wrote `text`. A name alone can come again: a port, a process number."""
    try:
        said = json.loads(text)
        return said["start"] == start_id() and said["time"] >= psutil.Process().create_time()
    except (ValueError, KeyError, TypeError):
        return False


def start_id() -> str:
    """The same on all ranks of one start, mostly another at the next; a launcher of ours names it."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "RANK" in os.environ and "SHARDFORGE_START" in os.environ:
        return os.environ["SHARDFORGE_START"] + (f"-{again}" if again != "0" else "")
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    names += ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
    found = [os.environ[name] for name in names if name in os.environ]
    return "-".join(found) if "RANK" in os.environ else f"pid-{os.getpid()}"
