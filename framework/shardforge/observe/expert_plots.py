"""How the experts of one or several runs were used, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shardforge.observe.expert_history import ExpertHistory, Picture
from shardforge.observe.history import History
from shardforge.observe.plots import COLORS, FAINT, INK, dress, plain, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REACH = 3
"""Powers of two from the even load at which the colors end."""

TIMES = 3
"""Loads of a run that are drawn: at its start, middle and end."""

LIMIT = 6
"""Runs whose layers are drawn one by one; of all there is a line."""


def experts_png(path: Path, histories: Sequence[History]) -> None:
    """Of each run loads by layer and expert at three times and MaxVio by layer over the steps; sums of all below.

    2100 pixels wide. `histories` are runs with experts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = histories[:LIMIT]
    figure = Figure(figsize=(14, 3.4 * len(drawn) + 3.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(drawn) + 1, 1, height_ratios=[*[1.15] * len(drawn), 1])
    top = max(_top(history.experts) for history in drawn)
    for row, history in enumerate(drawn):
        _run(figure.add_subfigure(grid[row]), history, top)
    _sums(figure.add_subfigure(grid[len(drawn)]), histories)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _top(experts: ExpertHistory | None) -> float:
    """The largest MaxVio, 1 at least: the end of a scale that all runs share."""
    return 1.0 if experts is None else float(np.fmax.reduce(experts.series["max_vio"], axis=None, initial=1.0))


def _run(figure: Figure, history: History, top: float) -> None:
    experts = history.experts
    assert experts is not None, history.path
    figure.suptitle(plain(history.name), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    pictures = experts.chosen(TIMES)
    axes = figure.subplots(1, len(pictures) + 1, width_ratios=[*[1] * len(pictures), 1.25])
    for place, picture in zip(axes, pictures, strict=False):
        loads = _loads(place, experts, picture, history.starts[-1].steps)
    bar = figure.colorbar(loads, ax=list(axes[:-1]), ticks=range(-REACH, REACH + 1), pad=0.01, aspect=30)
    bar.ax.set_yticklabels([f"1/{2**-power}" if power < 0 else f"{2**power}" for power in range(-REACH, REACH + 1)])
    bar.set_label("load over the even one; black: none", color=INK, fontsize=9)
    bar.ax.tick_params(colors=FAINT, labelsize=8, length=0)
    bar.outline.set_visible(False)
    _violations(figure, axes[-1], history.steps, experts, top)


def _loads(axes: Axes, experts: ExpertHistory, picture: Picture, steps: int):
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    way = LinearSegmentedColormap.from_list("load", ["#2563eb", "#e2e8f0", "#dc2626"])
    colors = way.with_extremes(under="#000000", bad="#ffffff")
    wide = max(map(len, picture.relative))
    powers = np.full((len(picture.relative), wide), np.nan)
    for row, relative in enumerate(picture.relative):
        alive = np.log2(relative, out=np.full(len(relative), -np.inf), where=relative > 0)
        powers[row, : len(relative)] = np.where(relative > 0, np.clip(alive, -REACH, REACH), -REACH - 1)
    image = axes.imshow(powers, cmap=colors, vmin=-REACH, vmax=REACH, aspect="auto", interpolation="nearest")
    axes.set_title(f"load, step {picture.step} of {steps}", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("expert", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _layers(axes, experts)
    return image


def _violations(figure: Figure, axes: Axes, steps: Sequence[int], experts: ExpertHistory, top: float) -> None:
    from matplotlib.colors import AsinhNorm

    values = experts.series["max_vio"].T
    norm = AsinhNorm(linear_width=1.0, vmin=0.0, vmax=top)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(experts.layers) - 0.5, -0.5)
    # nothing between: a mean over neighbouring steps would hide a short collapse
    image = axes.imshow(
        _stretched(values), norm=norm, cmap="magma_r", aspect="auto", extent=extent, interpolation="nearest"
    )
    axes.set_title("MaxVio by layer over the steps", loc="left", fontsize=10, color=INK)
    axes.set_xlabel("step", color=INK, fontsize=9)
    _layers(axes, experts)
    ticks = [value for value in (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if value <= top]
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30, ticks=ticks, format="%g")
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=FAINT, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _stretched(values: np.ndarray, columns: int = 500) -> np.ndarray:
    """[layers, steps] -> at most `columns`, the largest value of each stretch."""
    count = values.shape[1]
    if count <= columns:
        return values
    return np.fmax.reduceat(values, [i * count // columns for i in range(columns)], axis=1)


def _layers(axes: Axes, experts: ExpertHistory) -> None:
    every = math.ceil(len(experts.layers) / 12)
    axes.set_yticks(range(0, len(experts.layers), every), [f"layer {layer}" for layer in experts.layers[::every]])
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _sums(figure: Figure, histories: Sequence[History]) -> None:
    """Lines over tokens, one for each run: what there is of violation, dead experts, entropy, drops and similarity."""
    from matplotlib.ticker import EngFormatter, PercentFormatter

    told = [(history, history.experts, COLORS[i % len(COLORS)]) for i, history in enumerate(histories)]
    dropping = any(experts and experts.told("drop_rate") for _, experts, _ in told)
    alike = any(report.similarity for history in histories for report in history.evals)
    titles = ["MaxVio, worst layer", "dead experts, all layers", "router entropy, of the largest"]
    titles += ["dropped choices"] * dropping + ["similarity, mean and largest"] * alike
    panels = dict(zip(titles, figure.subplots(1, len(titles)), strict=True))
    for history, experts, color in told:
        assert experts is not None, history.path
        lines = [experts.most("max_vio"), experts.total("dead"), experts.mean("entropy_share")]
        lines += [experts.mean("drop_rate")] * dropping
        for axes, values in zip(panels.values(), lines, strict=False):
            tokens = history.columns["tokens_seen"]
            axes.plot(tokens, values, color=color, alpha=0.25, linewidth=1)
            span = max(1, len(values) // 80)
            axes.plot(tokens, smooth(values, span), color=color, linewidth=1.8, label=plain(history.name))
        if alike:
            _similarity(panels[titles[-1]], history, color)
    for title, axes in panels.items():
        dress(axes)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("tokens", color=INK, fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if title.startswith(("router", "dropped")):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if len(histories) > 1:
        panels[titles[0]].legend(frameon=False, fontsize=8, labelcolor=INK)


def _similarity(axes: Axes, history: History, color: str) -> None:
    reports = [report for report in history.evals if report.similarity]
    where = [history.at(report.step, history.columns["tokens_seen"]) for report in reports]
    means = [sum(report.similarity.values()) / len(report.similarity) for report in reports]
    axes.plot(where, means, color=color, linewidth=1.8, marker="o", markersize=4)
    axes.plot(where, [max(report.similarity.values()) for report in reports], color=color, linewidth=1, linestyle="--")
