"""A short stack with every neighbourhood of a long one: which kinds of block follow which, first and last included."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

Edges = dict[str, list[str]]


def shortened(layers: Sequence[str], at_least: int = 1) -> tuple[str, ...]:
    """A stack in which each block follows those, and only those, that it follows in `layers`; same ends.

    It is as short as the walk over the transitions allows, then lengthened to `at_least` layers where `layers` has as
    many: ["a"] * 30 becomes a, a; (a x 5, b) x 10 becomes a, a, b, a, b.
    """
    edges = transitions(layers)
    out = [layers[0]]
    seen: set[tuple[str, str]] = set()
    for before, name in pairwise(layers):
        if (before, name) not in seen:
            walk(out, before, edges, seen)
            seen.add((before, name))
            out.append(name)
    walk(out, layers[-1], edges, seen)
    if len(out) > len(layers):
        out = list(layers)
    while len(out) < min(at_least, len(layers)):
        grown = lengthened(out, edges)
        if grown is None:
            return tuple(layers)
        out = grown
    return tuple(out)


def transitions(layers: Sequence[str]) -> Edges:
    """Block -> the blocks that come right after it, in order of appearance."""
    edges: Edges = {name: [] for name in layers}
    for before, name in pairwise(layers):
        if name not in edges[before]:
            edges[before].append(name)
    return edges


def walk(out: list[str], to: str, edges: Edges, seen: set[tuple[str, str]]) -> None:
    """Append the shortest way from the last block of `out` to `to`."""
    way = path(out[-1], to, edges)
    seen.update(pairwise([out[-1], *way]))
    out.extend(way)


def path(start: str, to: str, edges: Edges) -> list[str]:
    """Blocks after `start` up to `to` along the edges; empty when they are the same."""
    ways: dict[str, list[str]] = {start: []}
    queue = [start]
    while to not in ways:
        here = queue.pop(0)
        for name in edges[here]:
            if name not in ways:
                ways[name] = [*ways[here], name]
                queue.append(name)
    return ways[to]


def lengthened(stack: list[str], edges: Edges) -> list[str] | None:
    """One more layer of the block that may follow itself and has fewest so far, else one more turn of a cycle."""
    runs = [(name, len(list(group))) for name, group in groupby(stack)]
    alone = [(count, index) for index, (name, count) in enumerate(runs) if name in edges[name]]
    if alone:
        _, chosen = min(alone)
        return [name for index, (name, count) in enumerate(runs) for _ in range(count + (index == chosen))]
    for place in range(len(stack) - 1, -1, -1):
        name = stack[place]
        for after in edges[name]:
            turn = cycle(name, after, edges)
            if turn:
                return [*stack[: place + 1], *turn, *stack[place + 1 :]]
    return None


def cycle(name: str, after: str, edges: Edges) -> list[str]:
    """The blocks of a way from `name` over `after` back to `name`; empty without one."""
    try:
        return [after, *path(after, name, edges)]
    except IndexError:
        return []
