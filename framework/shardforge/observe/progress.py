"""The live display of a run on a terminal; plain lines elsewhere."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console as Terminal
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardforge.core import units
from shardforge.observe import expert_rows
from shardforge.observe.base import EvalReport, Observer, RunInfo, Slow, StepReport
from shardforge.observe.console import Console, origin
from shardforge.observe.experts import ExpertUse
from shardforge.observe.throughput import Rates, Throughput

SPARK_WIDTH = 48
QUIET_S = 30.0
"""Silence after which the display says how long the last news is ago."""
SLOW_ROWS, SLOW_S = 3, 90.0
"""Slow ranks that are shown, and for how long after the last word of them."""


def display() -> Observer:
    """The live display when standard output is a terminal that can move its cursor, else plain lines."""
    if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return Progress()
    return Console()


class Progress:
    """Redrawn twice a second by a thread of its own; the terminal is given back at on_end, close or exit.

    Prints and log lines appear above the display. `clock` gives seconds and only measures silence.
    """

    def __init__(self, terminal: Terminal | None = None, clock: Callable[[], float] = time.monotonic):
        self._terminal = terminal or Terminal()
        self._clock = clock
        self._live: Live | None = None
        self._moved: list[logging.StreamHandler] = []
        self._throughput = Throughput()
        self._info: RunInfo | None = None
        self._forget()

    def _forget(self) -> None:
        self._report: StepReport | None = None
        self._rates: Rates | None = None
        self._eval: EvalReport | None = None
        self._loaded: Mapping[int, ExpertUse] = {}
        self._saved: int | None = None
        self._slow: tuple[Slow, ...] = ()
        self._slowed = 0.0
        self._verdict = ""
        self._losses = Trace(SPARK_WIDTH)
        self._news = self._clock()

    def on_start(self, info: RunInfo) -> None:
        if self._info is None or info.first_step == 0:
            self._forget()
        self._info, self._verdict, self._news = info, "", self._clock()
        self._throughput.restart()
        self._open()

    def on_step(self, report: StepReport) -> None:
        self._rates = self._throughput.add(report)
        self._report, self._news = report, self._clock()
        self._losses.add(report.loss)
        if any(use.relative for use in report.experts.values()):  # a step of a record may be without loads
            self._loaded = report.experts
        if report.slow:
            self._slow, self._slowed = report.slow, self._clock()

    def on_eval(self, report: EvalReport) -> None:
        self._eval, self._news = report, self._clock()

    def on_checkpoint(self, step: int, path: Path) -> None:
        self._saved, self._news = step, self._clock()

    def on_end(self, verdict: str) -> None:
        self._verdict = verdict
        self.close()

    def close(self) -> None:
        """Draw once more and give the terminal back. May be called at any time, also twice."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
            for handler in self._moved:
                handler.setStream(sys.stderr)
            self._moved = []
            atexit.unregister(self.close)

    def _open(self) -> None:
        if self._live is not None:
            return
        before = sys.stderr
        self._live = Live(console=self._terminal, get_renderable=self.render, refresh_per_second=2)
        self._live.start(refresh=True)
        atexit.register(self.close)
        # log handlers hold the stream of before; written to directly, it would tear the display
        for handler in logging.getLogger("shardforge").handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before and sys.stderr is not before:
                handler.setStream(sys.stderr)
                self._moved.append(handler)

    def render(self) -> Panel:
        """The display as it stands."""
        info, report, rates = self._info, self._report, self._rates
        if info is None:
            return Panel(Text("waiting for the run to start"), title="shardforge", title_align="left", width=72)
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", width=9)
        rows.add_column()
        if report is not None and rates is not None:
            self._fill(rows, report, rates)
        if self._eval is not None:
            rows.add_row("held-out", Text(f"{self._eval.loss:.4f} after step {self._eval.step}"))
        for each in self._slow[:SLOW_ROWS] if self._clock() - self._slowed < SLOW_S else ():
            rows.add_row("slow", Text(str(each), style="yellow"))
        if told := origin(info.attempt):
            rows.add_row("start", Text(told))
        if self._saved is not None:
            rows.add_row("saved", Text(f"step {self._saved}"))
        if self._status():
            rows.add_row("", Text(self._status(), style="bold"))
        heading = f"{info.name} · {units.count(info.weights)} weights · {info.layout} · {info.world_size} ranks"
        step = report.step if report is not None else info.first_step
        return Panel(Group(self._bar(step, info.steps, rates), rows), title=Text(heading), title_align="left", width=84)

    def _fill(self, rows: Table, report: StepReport, rates: Rates) -> None:
        loss = Text()
        loss.append(f"{report.loss:.4f}", style="bold" if math.isfinite(report.loss) else "bold red")
        loss.append(f"  mean {rates.loss:.4f}  ", style="dim")
        loss.append(self._losses.draw(self._terminal.encoding), style="cyan")
        speed = f"{units.count(rates.tokens_per_s)} tokens/s · {units.seconds(rates.step_seconds)} per step"
        compute = f"{units.count(rates.flops_per_s)} FLOP/s of the model"
        if rates.share is not None:
            compute += f" · {rates.share:.1%} of peak"
        wait = f"{rates.data_share:.1%} waiting for data · {rates.save_share:.1%} saving"
        rows.add_row("loss", loss)
        rows.add_row("gradient", Text(f"norm {report.grad_norm:.3f} · learning rate {report.lr:.2e}"))
        rows.add_row("speed", Text(speed))
        rows.add_row("compute", Text(compute))
        rows.add_row("time", Text(wait, style="yellow" if rates.data_share > 0.05 else ""))
        rows.add_row("memory", Text(units.bytes_(report.memory_bytes)))
        if report.experts:
            self._fill_experts(rows, report)

    def _fill_experts(self, rows: Table, report: StepReport) -> None:
        rows.add_row("experts", expert_rows.words(report.experts))
        further = expert_rows.further(report.experts, {} if self._eval is None else self._eval.similarity)
        if further:
            rows.add_row("", further)
        colored = self._terminal.color_system is not None and "utf" in self._terminal.encoding.lower()
        if self._loaded and colored:
            rows.add_row("load", expert_rows.picture([use.relative for use in self._loaded.values()]))

    def _bar(self, step: int, steps: int, rates: Rates | None) -> Table:
        left = f"{units.seconds(rates.eta_s)} left" if rates is not None and not self._verdict else ""
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=max(steps, 1), completed=step, width=40),
            Text(f"{step}/{steps}"),
            Text(f"{step / max(steps, 1):.0%}"),
            Text(left),
        )
        return bar

    def _status(self) -> str:
        quiet = self._clock() - self._news
        if self._verdict:
            return f"run {self._verdict}"
        return f"no news for {units.seconds(quiet)}" if quiet > QUIET_S else ""


class Trace:
    """Any number of values kept as at most 2 * width means of equally many values each."""

    def __init__(self, width: int):
        self._width, self._stride = width, 1
        self._means: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) == self._stride:
            self._means.append(sum(self._pending) / self._stride)
            self._pending = []
        if len(self._means) == 2 * self._width:
            self._means = [(a + b) / 2 for a, b in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stride *= 2

    def draw(self, encoding: str = "utf-8") -> str:
        """The newest means, one character each, from the lowest to the highest of them."""
        marks = "▁▂▃▄▅▆▇█" if "utf" in encoding.lower() else "_.-=+*#@"
        means = self._means
        if len(means) > self._width:
            means = [sum(pair) / len(pair) for pair in (means[i : i + 2] for i in range(0, len(means), 2))]
        if len(means) < 2:
            return ""
        low, high = min(means), max(means)
        scale = (len(marks) - 1) / (high - low) if high > low else 0.0
        return "".join(marks[round((value - low) * scale)] for value in means)
