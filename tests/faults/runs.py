"""Whole runs for fault tests: a tiny recipe, the command line in forked and in real processes, and what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.checkpoint.state import collect, table
from shardforge.checkpoint.store import Store
from shardforge.cli.main import main
from shardforge.core.rundir import RunDir
from shardforge.data.synthetic import markov
from shardforge.model.build import build
from shardforge.observe.jsonl import Tail
from shardforge.precision.types import DTYPES
from shardforge.recipe.load import load
from shardforge.train import world
from shardforge.train.loop import train
from shardforge.train.run import open_run
from shardforge.train.world import World
from tests.tiny import GLU, GQA

STEPS, VOCAB = 12, 64
PATIENCE_S = 120.0
"""A wait that takes longer has failed. It bounds a broken run and times nothing."""
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SHARDFORGE_START")


def write_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of some thousand weights over a corpus beside it; the run lies in folder/run."""
    if not (folder / "corpus").exists():
        markov(folder / "corpus", vocab=VOCAB, documents=80, tokens=60)
    block = {"mixer": GQA | {"kv_heads": 2}, "ffn": GLU}
    recipe = {
        "name": "tiny",
        "seed": 3,
        "run_dir": str(folder / "run"),
        "model": {"vocab": VOCAB, "hidden": 16, "blocks": {"one": block}, "stack": ["one x 2"], "dropout": 0.1},
        "data": {"sources": [{"path": str(folder / "corpus")}]},
        "schedule": {"kind": "constant", "lr": 0.01, "warmup": 3},
        "precision": {"compute": "fp32"},
        "checkpoint": {"every": 1},
        "train": {"steps": STEPS, "sequences": 4, "seq_len": 16, "eval_sequences": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe | changes))  # JSON is YAML
    return path


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def _child(words: list[str], place: Path, prepare: Callable[[], None] | None) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    logging.getLogger("shardforge").handlers.clear()
    warnings.simplefilter("ignore", ResourceWarning)  # as in a process of its own
    for name in LAUNCHED:
        os.environ.pop(name, None)
    os.fsync = lambda handle: None  # a killed process loses nothing that it has written
    world.cores = lambda: 1
    if prepare is not None:
        prepare()
    sys.exit(main(words))


def fork(folder: Path, *words: str, prepare: Callable[[], None] | None = None) -> BaseProcess:
    """`shardforge WORDS` as one forked process: no imports to wait for. `prepare` runs in it first."""
    target = (list(words), folder / "child", prepare)
    process = multiprocessing.get_context("fork").Process(target=_child, args=target)
    process.start()
    return process


def run(folder: Path, *words: str, prepare: Callable[[], None] | None = None) -> Ended:
    """The same, waited for."""
    process = fork(folder, *words, prepare=prepare)
    process.join(PATIENCE_S)
    assert process.exitcode is not None, f"still running after {PATIENCE_S} s"
    place = folder / "child"
    return Ended(process.exitcode, place.with_suffix(".out").read_text(), place.with_suffix(".err").read_text())


class Command:
    """A real command in processes of its own, killed with all its children when the block ends."""

    def __init__(self, folder: Path, *words: str, env: dict[str, str] | None = None):
        self.files = [(folder / name).open("w+") for name in ("command.out", "command.err")]
        plain = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
        self.process = subprocess.Popen(
            words, stdout=self.files[0], stderr=self.files[1], env=plain | {"OMP_NUM_THREADS": "1"} | (env or {})
        )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        for file in self.files:
            file.close()

    def kill(self) -> None:
        """SIGKILL to every process at once."""
        if self.process.poll() is None:
            everyone = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
            for each in everyone:
                each.suspend()
            for each in everyone:
                each.kill()
        self.process.wait()

    def ask(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ended(self) -> Ended:
        code = self.process.wait(PATIENCE_S)
        for file in self.files:
            file.seek(0)
        return Ended(code, self.files[0].read(), self.files[1].read())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for `condition`, which the command must bring about while it lives."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended with {self.ended()}"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)


def shardforge(folder: Path, *words: str, env: dict[str, str] | None = None) -> Command:
    return Command(folder, sys.executable, "-m", "shardforge", *words, env=env)


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step -> loss and gradient norm. A step that was computed twice must have been the same twice."""
    out: dict[int, tuple[float, float]] = {}
    for event in Tail(run_dir / "metrics.jsonl").new() if (run_dir / "metrics.jsonl").exists() else ():
        if event["event"] == "step":
            found = (event["loss"], event["grad_norm"])
            assert out.setdefault(event["step"], found) == found, f"step {event['step']} came out differently"
    return out


def held_out(run_dir: Path) -> list[float]:
    return [event["loss"] for event in Tail(run_dir / "metrics.jsonl").new() if event["event"] == "eval"]


def saved(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Weights and optimizer state of a checkpoint, whole, by name."""
    recipe = load(run_dir / "recipe.yaml").recipe
    model = build(recipe.model, recipe.objective.build(), DTYPES[recipe.precision.master]).to_empty(device="cpu")
    tensors = collect(model, recipe.optim.build(model))
    store = Store(RunDir(run_dir).checkpoints, recipe.checkpoint, describe={"model": table(model)})
    store.load(step, tensors)
    store.close()
    return tensors


def contents(folder: Path) -> dict[str, str]:
    """Every file of a run directory with its hash, but for those that any start may write."""
    any_start = ("failure.json", "verdict.txt", "lock")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in any_start)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def turn(path: Path, *sets: str) -> str:
    """On each rank of the pool: the run of a recipe as `shardforge train` turns it; the verdict."""
    recipe = load(path, sets)
    alone = dist.get_world_size() == 1
    here = World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), None if alone else dist.group.WORLD)
    with contextlib.redirect_stdout(io.StringIO()):
        opened = open_run(recipe, here)
        verdict = train(opened)
    if opened.held is not None:
        opened.held.close()
    return verdict
