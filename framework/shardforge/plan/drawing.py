"""Schedules as a PNG: a panel a schedule, a bar an action, on one axis of time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardforge.plan.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILL = {"F": "#93c5fd", "B": "#86efac", "I": "#bbf7d0", "W": "#fde68a"}
LATER = {"F": "#3b82f6", "B": "#22c55e", "I": "#4ade80", "W": "#f59e0b"}  # stages of a rank after its first
WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
WAITS = "#f3f4f6"
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"
DPI = 150


def draw(path: Path, timelines: Sequence[Timeline], held: Sequence[Sequence[str]]) -> None:
    """Write the PNG; held[i][rank] is what rank holds at most in timelines[i], as text. Numbers are micro-batches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sum(timeline.ranks for timeline in timelines)
    height = min(40.0, 1.1 + 0.55 * len(timelines) + 0.3 * rows)
    longest = max(timeline.time for timeline in timelines)
    figure = Figure(figsize=(14, height), dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        len(timelines), 1, squeeze=False, sharex=True, height_ratios=[timeline.ranks + 0.8 for timeline in timelines]
    )[:, 0]
    for axes, timeline, texts in zip(panels, timelines, held, strict=True):
        _panel(axes, timeline, texts, longest)
    panels[-1].set_xlabel(f"time; one micro-batch is {_work(timelines[0]):.4g} of work for a mean rank", color=INK)
    _legend(figure, timelines)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _panel(axes: Axes, timeline: Timeline, held: Sequence[str], longest: float) -> None:
    for rank, row in enumerate(timeline.spans):
        bars = [(span.start, span.end - span.start) for span in row]
        colors = [(FILL if span.action.stage < timeline.ranks else LATER)[span.action.work] for span in row]
        axes.broken_barh([(0, timeline.time)], (rank - 0.44, 0.88), facecolors=WAITS)
        thin = min(length for _, length in bars) / longest * 175 < 1  # edges would cover it
        axes.broken_barh(
            bars, (rank - 0.44, 0.88), facecolors=colors, edgecolors="white", linewidth=0.1 if thin else 0.5
        )
        for span in row:
            if (span.end - span.start) / longest * 175 > len(str(span.action.micro)) + 0.4:  # room for the digits
                axes.text(
                    (span.start + span.end) / 2, rank, str(span.action.micro),
                    ha="center", va="center_baseline", fontsize=6.5, color=INK, clip_on=True,
                )  # fmt: skip
        note = f"waits {timeline.bubbles[rank]:.1%}, holds {held[rank]}"
        axes.annotate(
            note, (1, rank), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=7.5, color=FAINT, annotation_clip=False,
        )  # fmt: skip
    stages = f"{timeline.chunks} stage{'s' * (timeline.chunks > 1)} a rank"
    axes.set_title(
        f"{timeline.schedule}: {stages}, {timeline.micro_batches} micro-batches, bubble {timeline.bubble:.1%}",
        loc="left", fontsize=10, fontweight="bold", color=INK,
    )  # fmt: skip
    axes.set_xlim(0, longest)
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)])
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _work(timeline: Timeline) -> float:
    """Of a micro-batch on a mean rank."""
    busy = sum(span.end - span.start for row in timeline.spans for span in row)
    return busy / timeline.ranks / timeline.micro_batches


def _legend(figure: Figure, timelines: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    works = {span.action.work for timeline in timelines for row in timeline.spans for span in row}
    marks = [Patch(color=color, label=WORDS[work]) for work, color in FILL.items() if work in works]
    marks.append(Patch(color=WAITS, label="waits"))
    if any(timeline.chunks > 1 for timeline in timelines):
        marks.append(Patch(color=LATER["F"], label="dark: later stages of a rank"))
    figure.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=8, labelcolor=INK)
