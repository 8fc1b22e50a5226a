"""What the live display shows of a mixture: its health in words, and each expert's load as a mark of color."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.color import Color
from rich.style import Style
from rich.text import Text

from shardforge.observe.experts import ExpertUse
from shardforge.observe.health import Health

STYLES = {"good": "", "watch": "yellow", "bad": "bold red"}
COLUMNS, ROWS = 64, 16
"""Marks of the picture across and down; where there are more experts or layers, one mark stands for the most uneven."""

REACH = 3.0
"""Powers of two from the even load at which colors end."""

BELOW, EVEN, ABOVE, DEAD = (37, 99, 235), (226, 232, 240), (220, 38, 38), (0, 0, 0)


def words(experts: Mapping[int, ExpertUse]) -> Text:
    """Of at least one layer; yellow or red by the layer that is worst off, see `health.level`."""
    health = Health.of(experts)
    text = Text(style=STYLES[health.level])
    text.append(f"MaxVio {health.max_vio:.2f} in layer {health.worst} · {health.dead} of {health.count} dead")
    text.append(f" · entropy {health.entropy_share:.0%}")
    if health.drop_rate:
        text.append(f" · {health.drop_rate:.1%} dropped")
    return text


def further(experts: Mapping[int, ExpertUse], similarity: Mapping[int, float]) -> Text:
    """The router's biases and how alike experts are, as far as known."""
    bias, told = Health.of(experts).bias, []
    if bias is not None:
        told.append(f"selection bias {bias[0]:.3g} to {bias[1]:.3g}")
    if similarity:
        layer = max(similarity, key=similarity.__getitem__)
        told.append(f"alike {similarity[layer]:.3f} in layer {layer}")
    return Text(" · ".join(told))


def picture(loads: Sequence[Sequence[float]]) -> Text:
    """Layers from the top, experts from the left; blue is less than the even load, red more, black none."""
    across = max(map(len, loads))
    grid = [[_extreme(cell) for cell in _runs(layer, min(COLUMNS, across))] for layer in loads]
    grid = [[_extreme(cell) for cell in zip(*rows, strict=False)] for rows in _runs(grid, min(ROWS, len(grid)))]
    text = Text()
    for top in range(0, len(grid), 2):
        below = grid[top + 1] if top + 1 < len(grid) else [None] * len(grid[top])
        for upper, lower in zip(grid[top], below, strict=False):
            text.append("▀", Style(color=_color(upper), bgcolor=None if lower is None else _color(lower)))
        text.append("\n" if top + 2 < len(grid) else "")
    return text


def _runs(values: Sequence, parts: int) -> list[Sequence]:
    """Neighbours together, in at most that many parts of nearly equal length."""
    count = len(values)
    parts = min(parts, count)
    return [values[i * count // parts : (i + 1) * count // parts] for i in range(parts)]


def _extreme(loads: Sequence[float]) -> float:
    return max(loads, key=lambda load: abs(math.log2(load)) if load > 0 else math.inf)


def _color(load: float) -> Color:
    if not load > 0:
        return Color.from_rgb(*DEAD)
    way = max(-1.0, min(1.0, math.log2(load) / REACH))
    end = ABOVE if way > 0 else BELOW
    return Color.from_rgb(*(round(a + (b - a) * abs(way)) for a, b in zip(EVEN, end, strict=True)))
