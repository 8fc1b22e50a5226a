"""One line per step on a stream that is no terminal: logs, pipes, batch jobs."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from shardforge.core import units
from shardforge.observe import health
from shardforge.observe.base import EvalReport, RunInfo, Slow, StepReport
from shardforge.observe.throughput import Rates, Throughput

HEADER = (
    f"{'step':>14} {'loss':>8} {'tokens/s':>9} {'peak':>6} {'grad':>8} {'lr':>8} {'left':>7} {'memory':>9} {'data':>5}"
)
REPEAT = 30
"""Lines after which the header comes again."""
SHOWN = 8
"""Slow ranks that are named at once."""


class Console:
    """Lines become rarer with time: at least 5 s apart, a hundredth of the life so far, at most a minute."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self._throughput = Throughput()
        self._lines, self._life, self._printed = 0, 0.0, -math.inf
        self._slow: set[tuple[int, str]] = set()

    def on_start(self, info: RunInfo) -> None:
        self._throughput.restart()
        self._lines, self._life, self._printed = 0, 0.0, -math.inf
        self._slow: set[tuple[int, str]] = set()
        self._say(introduction(info))
        if told := origin(info.attempt):
            self._say(told)

    def on_step(self, report: StepReport) -> None:
        rates = self._throughput.add(report)
        self._say_slow(report.slow)
        self._life += report.seconds
        pause = min(60.0, max(5.0, self._life / 100))
        if self._life - self._printed < pause and report.step < report.steps and math.isfinite(report.loss):
            return
        if self._lines % REPEAT == 0:
            self._say(HEADER)
        self._lines += 1
        self._printed = self._life
        self._say(line(report, rates))
        if trouble := health.warning(report.experts):
            self._say(trouble)

    def _say_slow(self, slow: Sequence[Slow]) -> None:
        """Whom nobody has heard of yet."""
        ranks = {(each.rank, each.measure) for each in slow}
        if not ranks <= self._slow:
            for each in slow[:SHOWN]:
                self._say(f"slow: {each}")
            if len(slow) > SHOWN:
                self._say(f"slow: and {len(slow) - SHOWN} more ranks")
        self._slow |= ranks

    def on_eval(self, report: EvalReport) -> None:
        self._say(f"held-out loss {report.loss:.4f} after step {report.step} ({units.count(report.tokens)} tokens)")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._say(f"checkpoint of step {step} in {path}")

    def on_end(self, verdict: str) -> None:
        self._say(f"run {verdict}")

    def _say(self, text: str) -> None:
        with suppress(BrokenPipeError):  # `| head` has seen enough; the run goes on
            print(text, file=self._stream, flush=True)


def introduction(info: RunInfo) -> str:
    """ "first: 8.40M weights, layout dp2 on 2 processes, steps 151 to 300 in runs/first"."""
    processes = f"{info.world_size} process{'es' * (info.world_size > 1)}"
    left = f"steps {info.first_step + 1} to {info.steps}"
    if info.first_step >= info.steps:
        left = f"all {info.steps} steps done"
    weights = units.count(info.weights)
    return f"{info.name}: {weights} weights, layout {info.layout} on {processes}, {left} in {info.path}"


def origin(attempt: Mapping[str, Any]) -> str:
    """ "job 123, restart 2, because: node2 went down"; "" where nobody has said anything of the kind."""
    words = [f"job {attempt['job']}"] if "job" in attempt else []
    words += [f"restart {attempt['restart']}"] if attempt.get("restart") else []
    words += [f"because: {attempt['reason']}"] if attempt.get("reason", "first") != "first" else []
    return ", ".join(words)


def line(report: StepReport, rates: Rates) -> str:
    """One row below HEADER: last loss and gradient norm, the other numbers as means over the window."""
    left = units.seconds(rates.eta_s) if rates.eta_s > 0 else "-"
    return (
        f"{f'{report.step}/{report.steps}':>14} {report.loss:8.4f} {units.count(rates.tokens_per_s):>9} "
        f"{peak(rates):>6} {report.grad_norm:8.3f} {report.lr:8.2e} {left:>7} "
        f"{units.bytes_(report.memory_bytes):>9} {rates.data_share:5.0%}"
    )


def peak(rates: Rates) -> str:
    """Share of peak FLOP/s, or the FLOP/s themselves when the peak is unknown."""
    return units.count(rates.flops_per_s) if rates.share is None else f"{rates.share:.1%}"
