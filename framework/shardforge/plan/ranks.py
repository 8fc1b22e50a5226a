"""Which ranks share a node, and which axis of a layout leaves it. No torch: the launcher and the log read this too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardforge.core.errors import LayoutError
from shardforge.core.layout import AXES, EXPERT_AXES, SHORT, Layout

PER_NODE = 8
DRAWN = 64
"""Ranks that are drawn at most."""
EXPERTS = tuple(axis for axis in EXPERT_AXES if axis not in AXES)
NAMES = {**SHORT, "efsdp": "edp"}
WIDTH = 120


@dataclass(frozen=True)
class Axis:
    """The groups along one axis: ranks that differ in nothing else."""

    name: str
    degree: int
    first: tuple[int, ...]  # the group of rank 0
    nodes: tuple[int, int]  # that a group touches: fewest, most over all groups

    @property
    def crosses(self) -> bool:
        return self.nodes[1] > 1

    @property
    def stride(self) -> int | None:
        """Between neighbours of the first group; None where it is uneven."""
        steps = {b - a for a, b in zip(self.first, self.first[1:], strict=False)}
        return steps.pop() if len(steps) == 1 else None

    @property
    def place(self) -> str:
        if not self.crosses:
            return "inside a node"
        least, most = self.nodes
        return f"crosses: {most} nodes a group" if least == most else f"crosses: {least} to {most} nodes a group"


def axes(layout: Layout, per_node: int = PER_NODE) -> list[Axis]:
    """Every axis of more than one rank, the dense ones before those of the experts."""
    if per_node < 1:
        raise LayoutError(f"a node has at least one rank, not {per_node}", "--per-node", "ranks of one machine, like 8")
    dense = [layout.coordinates(rank) for rank in range(layout.world_size)]
    found = [_axis(name, dense, per_node) for name in AXES]
    if layout.ep * layout.etp > 1:
        sparse = [layout.expert_coordinates(rank) for rank in range(layout.world_size)]
        found += [_axis(name, sparse, per_node) for name in EXPERTS]
    return [axis for axis in found if axis.degree > 1]


def _axis(name: str, places: Sequence[dict[str, int]], per_node: int) -> Axis:
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for rank, place in enumerate(places):
        rest = tuple(at for axis, at in place.items() if axis != name)
        groups.setdefault(rest, []).append((place[name], rank))
    touched = [len({rank // per_node for _, rank in group}) for group in groups.values()]
    first = next(group for group in groups.values() if any(rank == 0 for _, rank in group))
    return Axis(name, len(first), tuple(rank for _, rank in sorted(first)), (min(touched), max(touched)))


def heading(layout: Layout, per_node: int = PER_NODE) -> str:
    count = -(-layout.world_size // per_node)
    ranks = f"{layout.world_size} rank{'s' * (layout.world_size > 1)}"
    where = f"{count} node{'s' * (count > 1)} of {per_node}" if count > 1 else "one node"
    return f"layout {layout}: {ranks} on {where}, order {layout.order}"


def summary(layout: Layout, per_node: int = PER_NODE) -> list[str]:
    """The layout for a log: at most nine lines."""
    return [heading(layout, per_node)] + [
        f"  {axis.name} {axis.degree}: {shown(axis.first)}{_strided(axis)}, {axis.place}"
        for axis in axes(layout, per_node)
    ]


def table(layout: Layout, per_node: int = PER_NODE) -> list[str]:
    """Every axis with its degree, first group, stride and nodes, one line each."""
    found = axes(layout, per_node)
    rows = [("axis", "degree", "stride", "first group", "where")]
    rows += [
        (axis.name, str(axis.degree), str(axis.stride or "uneven"), shown(axis.first), axis.place) for axis in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {degree:>{widths[1]}}  {stride:>{widths[2]}}  {first:<{widths[3]}}  {where}"
        for name, degree, stride, first, where in rows
    ]
    busy = [axis.name for axis in found if axis.name in ("tp", "etp") and axis.crosses]
    advice = [
        f"{name} sums in every layer and crosses nodes: a smaller {name}, or another parallel.order" for name in busy
    ]
    return [heading(layout, per_node), "", *(lines if found else ["every axis has one rank"]), *advice]


def drawing(layout: Layout, per_node: int = PER_NODE) -> list[str]:
    """Nodes as boxes, each rank with its place on every axis of more than one rank; nothing above `DRAWN` ranks."""
    if layout.world_size > DRAWN:
        return []
    shown_axes = [axis.name for axis in axes(layout, per_node)]
    cells = []
    for rank in range(layout.world_size):
        place = layout.coordinates(rank) | layout.expert_coordinates(rank)
        cells.append(" ".join([f"{rank:>2}", *(f"{NAMES[name]}{place[name]}" for name in shown_axes)]))
    width = max(len(cell) for cell in cells)
    across = max(n for n in range(1, per_node + 1) if n == 1 or (per_node % n == 0 and n * (width + 3) < WIDTH))
    rule = "+" + "+".join(["-" * (width + 2)] * min(across, len(cells))) + "+"
    lines = []
    for node in range(0, len(cells), per_node):
        lines += [f"node {node // per_node}", rule]
        mine = cells[node : node + per_node]
        for start in range(0, len(mine), across):
            row = mine[start : start + across] + [""] * (across - len(mine[start : start + across]))
            row = row[: min(across, len(cells))]
            lines.append("|" + "|".join(f" {cell:<{width}} " for cell in row) + "|")
        lines.append(rule)
    return lines


def shown(ranks: Sequence[int], most: int = 8) -> str:
    """ "0 1 2 3", or "0 1 2 ... 63" where there are many."""
    if len(ranks) <= most:
        return " ".join(map(str, ranks))
    return " ".join([*map(str, ranks[:3]), "...", str(ranks[-1])])


def _strided(axis: Axis) -> str:
    return f" (stride {axis.stride})" if axis.degree > 2 and axis.stride else ""
