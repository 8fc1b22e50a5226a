"""Several processes on this machine, with torchrun's agent underneath."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from shardforge.core.errors import EngineError
from shardforge.core.rundir import RunDir

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def launch(words: Sequence[str], processes: int, run_dir: RunDir) -> int:
    """Run `shardforge WORDS` on `processes` ranks; the exit code of the first that failed (128 + the signal that ended
    it, as a shell says it), or 0.

    A signal that asks for a stop becomes the STOP file, which the ranks agree on; a second SIGINT ends them at once.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the ranks say themselves what went wrong
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    os.environ["SHARDFORGE_START"] = uuid.uuid4().hex
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=os.environ["SHARDFORGE_START"],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        **_handled(LaunchConfig),
    )
    before = {number: signal.signal(number, _asker(run_dir.stop)) for number in ASKING}
    try:
        elastic_launch(config, sys.executable)("-m", "shardforge", *words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else _ended(rank, -failure.exitcode, run_dir)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _ended(rank: int, number: int, run_dir: RunDir) -> int:
    """The exit code of a rank that a signal ended, which could say nothing itself; the others may have noticed."""
    said = run_dir.failure.read_text() if run_dir.failure.exists() else ""
    if os.environ["SHARDFORGE_START"] not in said:
        lost = EngineError(
            f"rank {rank} was ended by {signal.Signals(number).name}",
            run_dir.path,
            "SIGKILL is often the system out of memory; start again: the run resumes from its last checkpoint",
        )
        print(f"error: {lost}", file=sys.stderr, flush=True)
    return 128 + number


def _handled(config: type) -> dict[str, str]:
    """torch 2.12 and later take the agent's signals as a field that overrides the environment."""
    return {"signals_to_handle": "SIGQUIT"} if "signals_to_handle" in config.__dataclass_fields__ else {}


def _asker(stop: Path):
    def ask(number: int, frame: object) -> None:
        if number == signal.SIGINT and stop.exists():
            raise KeyboardInterrupt
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()

    return ask
