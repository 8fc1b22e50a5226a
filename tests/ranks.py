"""A pool of warm gloo processes shared by the whole test run: a case costs fractions of a second, not a start-up."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardforge.parallel import mesh

TIMEOUT_S = 240


class RankFailure(AssertionError):
    """A function failed on some rank; the message holds that rank's traceback."""


class Ranks:
    """`size` forked processes joined in one gloo group; `run(f, *args)` calls f on each and returns all results."""

    def __init__(self, size: int):
        self.size = size
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []

    def start(self) -> None:
        torch.set_num_threads(1)  # a forked child cannot use the thread pool of its parent
        context = multiprocessing.get_context("fork")
        store = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), there), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """function(*args) on every rank. The function must be importable by name; results are pickled."""
        if not self.workers:
            self.start()
        task = pickle.dumps((function, args))
        for _, pipe in self.workers:
            pipe.send_bytes(task)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.size:
            for rank, (process, pipe) in enumerate(self.workers):
                if rank not in answers and pipe.poll(0.002):
                    try:
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        answers[rank] = (False, f"rank {rank} died with exit code {process.exitcode}")
            if any(not good for good, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + 1.0)  # the others may wait for the dead one for ever
            if time.monotonic() > deadline:
                break
        failures = {rank: text for rank, (good, text) in answers.items() if not good}
        missing = sorted(set(range(self.size)) - set(answers))
        if failures or missing:
            self.stop()
            told = "\n".join(f"rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
            raise RankFailure(f"{told}\nno answer from ranks {missing}" if missing else told)
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), TORCHINDUCTOR_COMPILE_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    mesh.share_groups()
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
