"""What a rank says when something goes wrong: one rank speaks, the others leave quietly, none hangs."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
import traceback
from collections.abc import Callable

import psutil

from shardforge.core import log
from shardforge.core.errors import EngineError, ForgeError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train.lock import Occupied

MISTAKE, CRASH, INTERRUPTED = 2, 1, 130
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL communicator was aborted")


def guarded(run_dir: RunDir, layout: Layout, work: Callable[[], int]) -> int:
    """work()'s exit code; a failure becomes a message from the first rank that met one, and an exit code."""
    try:
        return work()
    except Occupied as error:  # met by all ranks alike, and the directory is not ours to write into
        if log.rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return MISTAKE
    except ForgeError as error:
        speak(run_dir, f"error: {error}")
        return MISTAKE
    except KeyboardInterrupt:
        speak(run_dir, "interrupted; the last committed checkpoint is what a new start goes on from")
        return INTERRUPTED
    except Exception as error:
        here = ", ".join(f"{axis} {place}" for axis, place in layout.coordinates(log.rank()).items())
        if any(sign in str(error) for sign in LOST):
            lost = EngineError(
                f"rank {log.rank()} ({here}) lost contact with another rank in a collective",
                run_dir.path,
                "look for what ended that process (memory, a signal, its node) and start again: the run resumes "
                "from its last checkpoint",
            )
            speak(run_dir, f"error: {lost}")
        else:
            speak(run_dir, f"rank {log.rank()} ({here}) failed:\n{traceback.format_exc()}")
        return CRASH


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
