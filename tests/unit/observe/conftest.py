from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from shardforge.observe.base import EvalReport, RunInfo, Slow, StepReport
from shardforge.observe.experts import ExpertTally
from shardforge.observe.jsonl import MetricsFile

Write = Callable[..., Path]


def report(step: int, **changes: float) -> StepReport:
    """A step of two seconds, 1000 tokens and 10 FLOP, half of the peak."""
    one = StepReport(
        step=step, steps=10, loss=10.0 - step, terms={"z_loss": 0.5}, grad_norm=1.5, lr=1e-3, tokens=1000,
        tokens_seen=1000 * step, seconds=2.0, data_seconds=0.5, save_seconds=0.25, model_flops=10.0, peak_flops=10.0,
        memory_bytes=2**30,
    )  # fmt: skip
    return replace(one, **changes)


def use(*loads: float, dropped: float = 0.0, bias: tuple[float, float] | None = None) -> ExpertTally:
    """A layer whose 100 tokens have half a nat each."""
    return ExpertTally(tuple(map(float, loads)), 100.0, 50.0, dropped, bias)


EVEN, SKEWED, LOST = use(25, 25, 25, 25), use(80, 10, 5, 5), use(190, 10, 0, 0)


@pytest.fixture
def write_mixture(make_info: Callable[..., RunInfo]) -> Callable[..., Path]:
    """The metrics of one life of a run with two layers of experts, the second of which loses two at `lost_at`."""

    def write(folder: Path, steps: Iterable[int], lost_at: int = 1000, **info: object) -> Path:
        file = MetricsFile(folder / "metrics.jsonl", clock=lambda: 1.0)
        file.on_start(make_info(path=folder, **info))
        for step in steps:
            second = LOST if step >= lost_at else SKEWED
            file.on_step(replace(report(step), experts={1: EVEN, 3: second}))
            file.on_eval(EvalReport(step=step, loss=2.0, tokens=64, similarity={1: 0.125, 3: step / 10}))
        file.on_end("finished")
        return folder / "metrics.jsonl"

    return write


@pytest.fixture
def late() -> Slow:
    """A rank whose own work takes twice as long."""
    return Slow(5, "dp1", "node3", "work", 1.5, 0.75)


@pytest.fixture
def make_report() -> Callable[..., StepReport]:
    return report


@pytest.fixture
def make_info(tmp_path: Path) -> Callable[..., RunInfo]:
    def make(**changes: object) -> RunInfo:
        one = RunInfo(
            name="first", path=tmp_path, layout="dp2", world_size=2, weights=8_000_000, steps=10, first_step=0,
            recipe={"seed": 3}, unigram_entropy=6.5,
        )  # fmt: skip
        return replace(one, **changes)

    return make


@pytest.fixture
def write_life(make_info: Callable[..., RunInfo]) -> Callable[..., Path]:
    """Append one life of a run to the metrics of a folder; its clock goes on by a second with each event."""
    ticks = count(100)

    def write(
        folder: Path, steps: Iterable[int], verdict: str = "finished", evals: Iterable[int] = (), shift: float = 0.0,
        **info: object,
    ) -> Path:  # fmt: skip
        path = folder / "metrics.jsonl"
        file = MetricsFile(path, clock=lambda: float(next(ticks)))
        file.on_start(make_info(path=folder, **info))
        for step in steps:
            file.on_step(report(step, loss=10.0 - step + shift))
            if step in evals:
                file.on_eval(EvalReport(step=step, loss=20.0 - step + shift, tokens=64))
                file.on_checkpoint(step, folder / "checkpoints" / f"step-{step}")
        if verdict:
            file.on_end(verdict)
        return path

    return write
