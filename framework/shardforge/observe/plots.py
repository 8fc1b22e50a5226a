"""The loss of one or several runs as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardforge.observe.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#64748b")
INK, FAINT, GRID = "#1f2937", "#6b7280", "#e5e7eb"


def loss_png(path: Path, histories: Sequence[History], *, logarithmic: bool = False) -> None:
    """Loss over tokens with held-out points and resume marks, the learning rate below: 1350 x 900 pixels.

    Single steps are pale, their running mean is strong. `logarithmic` draws the loss on a log axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    for index, history in enumerate(histories):
        _draw(loss, rate, history, COLORS[index % len(COLORS)])
    entropies = sorted({history.unigram_entropy for history in histories if history.unigram_entropy})
    for entropy in entropies:
        loss.axhline(entropy, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
        loss.annotate(
            f"unigram entropy {entropy:.2f}", (1, entropy), xycoords=("axes fraction", "data"),
            xytext=(-6, 4), textcoords="offset points", ha="right", color=FAINT, fontsize=9,
        )  # fmt: skip
    if logarithmic:
        loss.set_yscale("log")
    _dress(loss, rate, histories)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def smooth(values: Sequence[float], span: int) -> list[float]:
    """Mean around each place, its weights falling by 1/e over `span` places to both sides; what is not finite is nan.

    Both sides count, or the mean of a falling loss would lie above it.
    """
    before = _decaying(values, span)
    after = _decaying(values[::-1], span)[::-1]
    return [
        (total + other - value) / (weight + rest - 1) if math.isfinite(value) else math.nan
        for value, (total, weight), (other, rest) in zip(values, before, after, strict=True)
    ]


def _decaying(values: Sequence[float], span: int) -> list[tuple[float, float]]:
    """At each place the weighted sum of the finite values so far, and the sum of the weights."""
    keep = 1 - 1 / max(span, 1)
    total = weight = 0.0
    out = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append((total, weight))
    return out


def _draw(loss: Axes, rate: Axes, history: History, color: str) -> None:
    tokens, values = history.columns["tokens_seen"], history.columns["loss"]
    loss.plot(tokens, values, color=color, alpha=0.22, linewidth=1)
    loss.plot(tokens, smooth(values, max(1, len(values) // 80)), color=color, linewidth=2, label=plain(history.name))
    if history.evals:
        where = [history.at(report.step, tokens) for report in history.evals]
        dots: dict[str, Any] = {
            "marker": "o",
            "linestyle": "",
            "markersize": 6,
            "markeredgecolor": "white",
            "markeredgewidth": 1.2,
        }
        dashes: dict[str, Any] = {"linestyle": "--", "linewidth": 1.4}  # so many dots would hide the loss
        style = dots if len(where) <= 60 else dashes
        label = f"{plain(history.name)}, held out"
        loss.plot(where, [report.loss for report in history.evals], color=color, label=label, zorder=3, **style)
    named = len(history.resumes) < 6
    for step in history.resumes:
        for axes in (loss, rate):
            axes.axvline(history.at(step, tokens), color=color, linestyle=":", linewidth=1.2, alpha=0.8)
        loss.annotate(
            f"resumed at step {step}" if named else "",
            (history.at(step, tokens), 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -6),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            color=color,
        )
    rate.plot(tokens, history.columns["lr"], color=color, linewidth=1.6)


def _dress(loss: Axes, rate: Axes, histories: Sequence[History]) -> None:
    from matplotlib.ticker import EngFormatter

    title = histories[0].name if len(histories) == 1 else f"{len(histories)} runs"
    loss.set_title(plain(title), loc="left", fontsize=13, fontweight="bold", color=INK)
    loss.set_ylabel("loss, nats per token", color=INK)
    rate.set_ylabel("learning rate", color=INK)
    rate.set_xlabel("tokens", color=INK)
    rate.xaxis.set_major_formatter(EngFormatter(sep=""))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rate.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=9, loc="upper right", labelcolor=INK)
    for axes in (loss, rate):
        dress(axes)


def dress(axes: Axes) -> None:
    """The look of every chart."""
    axes.margins(x=0.01)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def plain(name: str) -> str:
    """matplotlib reads $...$ as mathematics and leaves names with a leading underscore out of legends."""
    return "\u200b" * name.startswith("_") + name.replace("$", r"\$")
