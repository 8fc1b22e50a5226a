"""Local gloo processes with a verdict for each call: all answers, or which rank failed and where the others wait."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import shardforge
from shardforge.core.errors import ForgeError
from shardforge.parallel import mesh

CONSEQUENCE = "gloo"
"""A word in every error of a rank that lost another one."""
ASKING = {signal.SIGINT}
GRACE_S = 1.0
"""How long the others may still answer once a rank has failed: they may wait for it for ever."""
HOME = Path(shardforge.__file__).parent


@dataclass
class Failure(Exception):
    """What a call came to when not every rank answered."""

    raised: dict[int, str] = field(default_factory=dict)  # rank -> its error: causes before what they led to
    refused: ForgeError | None = None  # the first of these errors, where it is a mistake with a fix
    waiting: dict[int, str] = field(default_factory=dict)  # rank without an answer -> where it stood
    timeout_s: float | None = None  # set where nothing but time ended the call
    details: str = ""  # tracebacks

    def __str__(self) -> str:
        return self.told()

    def told(self, name: Callable[[int], str] = lambda rank: f"rank {rank}") -> str:
        """One line; `name` says how to call a rank."""
        parts = [f"{name(rank)}: {text}" for rank, text in list(self.raised.items())[:1]]  # the others follow from it
        if self.timeout_s is not None:
            parts.append(f"no answer within {self.timeout_s:g} s")
        places: dict[str, list[str]] = {}
        for rank, place in self.waiting.items():
            places.setdefault(place, []).append(name(rank))
        return "; ".join(parts + [f"{', '.join(ranks)} stood in {place}" for place, ranks in places.items()])


class Pool:
    """`size` forked processes in one gloo group; `run(f, *args)` calls f on each. `folder` takes what they print.

    `tamper` ("module:function") is called in every process before anything else: tests put a mistake back with it.
    """

    def __init__(self, size: int, folder: Path, *, timeout_s: float = 120.0, tamper: str = ""):
        self.size, self.timeout_s, self.tamper = size, timeout_s, tamper
        self.folder = Path(tempfile.mkdtemp(prefix=f"ranks-{size}-", dir=folder))
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.starts = 0

    def start(self) -> None:
        torch.set_num_threads(1)  # a forked child cannot use the thread pool of its parent
        context = multiprocessing.get_context("fork")
        self.starts += 1
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)  # a fork in between would lose it, here and in the child
        try:
            for rank in range(self.size):
                here, there = context.Pipe()
                others = [pipe for _, pipe in self.workers] + [here]
                process = context.Process(target=_serve, args=(self, rank, there, others), daemon=True)
                process.start()
                there.close()
                self.workers.append((process, here))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(*args) of every rank, in order of rank. Failure when a rank raises, dies or does not answer."""
        if not self.workers:
            self.start()
        task = pickle.dumps((function, args))
        answers: dict[int, Any] = {}
        failure = Failure()
        for rank, (_, pipe) in enumerate(self.workers):
            try:
                pipe.send_bytes(task)
            except OSError:
                failure.raised[rank] = self.death(rank)
        deadline = time.monotonic() + self.timeout_s
        while len(answers) + len(failure.raised) < self.size and time.monotonic() < deadline:
            for rank, (_, pipe) in enumerate(self.workers):
                if rank in answers or rank in failure.raised or not pipe.poll(0.002):
                    continue
                self.take(rank, pipe, answers, failure)
                if failure.raised:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(answers) == self.size:
            return [answers[rank] for rank in range(self.size)]
        failure.raised = dict(sorted(failure.raised.items(), key=lambda item: CONSEQUENCE in item[1]))
        missing = set(range(self.size)) - answers.keys() - failure.raised.keys()
        failure.waiting = {rank: self.place(rank) for rank in sorted(missing)}
        failure.timeout_s = None if failure.raised else self.timeout_s
        self.stop()
        raise failure

    def take(self, rank: int, pipe: Connection, answers: dict[int, Any], failure: Failure) -> None:
        try:
            good, answer = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            failure.raised[rank] = self.death(rank)
            return
        if good:
            answers[rank] = answer
            return
        text, error, details = answer
        if failure.refused is None:
            failure.refused = error
        failure.raised[rank] = text
        failure.details += f"rank {rank}:\n{details}"

    def death(self, rank: int) -> str:
        process = self.workers[rank][0]
        process.join(GRACE_S)
        code = process.exitcode
        how = f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name
        said = self.log(rank).read_text(errors="replace").strip().splitlines() if self.log(rank).exists() else []
        return f"the process ended with {how}" + (f" after saying: {said[-1]}" if said else "")

    def place(self, rank: int) -> str:
        """Where a rank without an answer stands: the collective or call, and the line of ours that made it."""
        stack = self.log(rank).with_suffix(".stack")
        process = self.workers[rank][0]
        if process.pid is None or not process.is_alive():
            return "no process any more"
        os.kill(process.pid, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and not (stack.exists() and stack.read_text().count("\n") > 2):
            time.sleep(0.02)
        return standing(stack.read_text()) if stack.exists() else "a place that it could not tell"

    def log(self, rank: int) -> Path:
        return self.folder / f"{self.starts}-{rank}.log"

    def stop(self) -> None:
        for process, pipe in self.workers:
            pipe.close()
            process.kill()
            process.join()
        self.workers = []


def standing(stack: str) -> str:
    """Of a faulthandler dump, the innermost function and the innermost line of ours."""
    frames = re.findall(r'File "(.*?)", line (\d+) in (\S+)', stack)
    ours = [(file, line, name) for file, line, name in frames if HOME in Path(file).parents]
    if not frames or not ours:
        return "a place that it could not tell"
    file, line, name = ours[0]
    told = f"{Path(file).relative_to(HOME)}:{line} ({name})"
    inner = frames[0]
    called = next((f for f in frames if "distributed_c10d" in f[0] and f[2] != "wrapper"), inner)
    return told if inner == ours[0] else f"{called[2]}, called at {told}"


def _serve(pool: Pool, rank: int, pipe: Connection, others: Sequence[Connection]) -> None:
    """A rank's life: whatever it prints goes to its log, and it ends when its pipe does."""
    for other in others:
        other.close()  # else a rank would keep the others alive after the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its ranks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    log = os.open(pool.log(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115, it lasts as long as the process
    with pool.log(rank).with_suffix(".stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        nodes = str(max(1, pool.size // 2))  # two nodes, so that two-hop dispatch has both of its hops
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(pool.size), LOCAL_WORLD_SIZE=nodes)
        warnings.simplefilter("ignore")
        store = dist.FileStore(str(pool.folder / f"{pool.starts}.store"), pool.size)
        timeout = timedelta(seconds=2 * pool.timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=pool.size, timeout=timeout)
        mesh.share_groups()
        if pool.tamper:
            module, _, function = pool.tamper.partition(":")
            getattr(importlib.import_module(module), function)()
        _answer(pipe)


def _answer(pipe: Connection) -> None:
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any] = (True, function(*args))
        except Exception as error:
            refused = error if isinstance(error, ForgeError) else None
            answer = (False, (told(error), refused, traceback.format_exc()))
        try:
            pipe.send_bytes(pickle.dumps(answer))
        except OSError:
            return


def told(error: Exception) -> str:
    """One line: what was raised, and the innermost line of ours that led to it."""
    if isinstance(error, ForgeError):
        return str(error)
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if HOME in Path(frame.filename).parents]
    where = f" ({Path(ours[-1].filename).relative_to(HOME)}:{ours[-1].lineno})" if ours else ""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}{where}"
