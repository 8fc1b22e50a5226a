"""Whole runs on the lab: a tiny recipe through `shardforge launch`, what is done to it, and what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.faults import runs
from tests.slurm.lab import PATIENCE_S, Lab, LabError, wait
from tests.tiny_kinds import MOE

LONG = {"steps": 200, "sequences": 4, "seq_len": 16, "eval_sequences": 4}
"""A run that something can happen to."""
MIXTURE = {"mixer": runs.GQA | {"kv_heads": 2}, "ffn": MOE}


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe whose run lies in folder/run; `blocks` is the one kind of its two blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    return runs.write_recipe(folder, **changes)


def mixture(vocab: int = runs.VOCAB) -> dict[str, Any]:
    """A model with experts in place of that of the recipe."""
    return {"vocab": vocab, "hidden": 16, "blocks": {"one": MIXTURE}, "stack": ["one x 2"], "dropout": 0.1}


def profile(folder: Path, **changes: Any) -> Path:
    """The lab as a cluster profile. `changes` are sections, merged key by key."""
    sections: dict[str, Any] = {
        "scheduler": "slurm",
        "queue": {"partition": "main", "walltime": "00:30:00", "lead_s": 60, "startup_s": 10},
        "node": {"ranks": 2, "cpus": 4, "exclusive": False, "memory_gb": 4},
        "environment": {"kind": "host", "python": sys.executable},
        "network": {"files": ["ranks", "cpu"]},
        "storage": {"local": []},
        "preflight": {"gpus": "unchecked", "share": 0.0, "free_memory": 0},
    }
    for name, change in changes.items():
        sections[name] = {**sections.get(name, {}), **change} if isinstance(change, dict) else change
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "lab.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@dataclass
class Job:
    """A run that was handed to the lab."""

    lab: Lab
    run_dir: Path
    numbers: list[str]
    said: str = ""

    @property
    def number(self) -> str:
        return self.numbers[-1]

    def slurm(self) -> dict[str, str]:
        return self.lab.job(self.number)

    def over(self, patience_s: float = 3 * PATIENCE_S) -> dict[str, str]:
        try:
            return self.lab.over(self.number, patience_s)
        except LabError as error:
            raise LabError(f"{error}\n{self.told()}") from error

    def attempts(self, event: str = "end") -> list[dict[str, Any]]:
        return [line for line in lines(self.run_dir / "launch" / "attempts.jsonl") if line["event"] == event]

    def step(self) -> int:
        """The last step that the metrics tell of."""
        return max(
            (line["step"] for line in lines(self.run_dir / "metrics.jsonl") if line["event"] == "step"), default=0
        )

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait for what the job must bring about while it lives."""

        def there() -> bool:
            state = self.slurm()["JobState"]
            if not condition():
                if state in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT", "NODE_FAIL"):
                    raise LabError(f"{what}: the job is {state}\n{self.told()}")
                return False
            return True

        try:
            wait(there, what)
        except LabError as error:
            raise LabError(f"{error}\n{self.told()}") from error

    def until_attempt(self, number: int, steps: int = 3) -> dict[str, Any]:
        """Wait until the given attempt has trained `steps` new steps; its begin line."""
        self.until(lambda: len(self.attempts("begin")) >= number, f"attempt {number}")
        begun = self.attempts("begin")[number - 1]
        goal = max(self.step(), begun["step"] or 0) + steps
        self.until(lambda: self.step() >= goal, f"step {goal} of attempt {number}")
        return begun

    def ranks(self, rank: int) -> list[int]:
        """The processes of a rank, as seen from here."""
        wanted = {f"RANK={rank}", f"SLURM_JOB_ID={self.number}", f"SLURM_CONF={self.lab.conf}"}
        return sorted(pid for pid, words in environments() if wanted <= words)

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        self.until(lambda: self.ranks(rank), f"rank {rank}")
        os.kill(self.ranks(rank)[0], number)

    def warn(self) -> None:
        """What Slurm does ahead of the time limit, now."""
        self.lab.ask("scancel", "--batch", "--signal=USR1", self.number)

    def told(self) -> str:
        """The end of everything that the job printed."""
        found = sorted((self.run_dir / "launch").rglob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in found)


def launch(lab: Lab, recipe: Path, *words: str, cluster: Path | None = None) -> Job:
    """`shardforge launch RECIPE --cluster LAB WORDS`, which must succeed; its job is not waited for."""
    cluster = cluster or profile(recipe.parent)
    command = (sys.executable, "-m", "shardforge", "launch", str(recipe), "--cluster", str(cluster), *words)
    done = lab.call(*command, folder=recipe.parent)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    numbers = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("job ")]
    assert numbers, done.stdout
    return Job(lab, recipe.parent / "run", numbers, done.stdout)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def environments() -> list[tuple[int, set[str]]]:
    """Process number and environment of everything that runs on this machine."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            found.append((int(process.name), set(words)))
    return found
