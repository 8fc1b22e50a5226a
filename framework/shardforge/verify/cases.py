"""Which layouts stand for the one that was asked for, and what they leave unproved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from shardforge.core.layout import SHORT, Layout
from shardforge.recipe.build import choices, hints

Pair = frozenset[Any]

OPTIONS = {
    "schedule": ("pp",),
    "context": ("cp",),
    "dispatch": ("ep",),
    "overlap": ("tp",),
    "zero": ("dp_shard", "cp", "pp"),
    "recompute": tuple(SHORT),
}
"""Fields of an engine that say how a step is computed -> the axes without any of which they mean nothing."""
ELSEWHERE = ("deepep",)
"""Values that need a GPU."""


@dataclass(frozen=True)
class Case:
    """One layout and how its steps are computed: engine options over the recipe's, and micro-batches."""

    layout: Layout
    options: tuple[tuple[str, Any], ...] = ()
    micro_batches: int = 1

    def __str__(self) -> str:
        words = [f"{name}={value}".lower() for name, value in self.options]
        if self.micro_batches > 1:
            words.append(f"{self.micro_batches} micro-batches")
        return " ".join([str(self.layout), *words])


@dataclass(frozen=True)
class Plan:
    """Layouts to verify, and one sentence for everything that they do not show."""

    layouts: tuple[Layout, ...]
    unproved: tuple[str, ...] = field(default=())


def used(layout: Layout) -> tuple[str, ...]:
    """Axes of more than one rank; efsdp where expert weights are both distributed and sharded."""
    axes = tuple(axis for axis in SHORT if layout.degree(axis) > 1)
    sharded = layout.ep * layout.etp > 1 and layout.efsdp > 1
    return (*axes, "efsdp") if sharded else axes


def short(axes: Iterable[str]) -> str:
    return " x ".join(SHORT.get(axis, axis) for axis in axes)


def covering(layout: Layout, processes: int) -> Plan:
    """The layout itself where it fits `processes`; else as few smaller ones as combine every two of its axes."""
    if layout.world_size <= processes:
        return Plan((layout,))
    options = [[n for n in range(1, processes + 1) if layout.degree(axis) % n == 0] for axis in SHORT]
    small = [found for degrees in itertools.product(*options) if (found := fitting(layout, degrees, processes))]
    small = [each for each in small if set(used(each)) <= set(used(layout))]
    wanted = pairs(used(layout))
    chosen = cover(wanted, small, lambda each: pairs(used(each)), prefer=lambda each: (len(used(each)), *largest(each)))
    return Plan(tuple(chosen), tuple(missing(layout, chosen)))


def fitting(layout: Layout, degrees: Sequence[int], processes: int) -> Layout | None:
    """`layout` with other degrees, where it is one of several ranks on at most `processes`."""
    by_axis = dict(zip(SHORT, degrees, strict=True))
    dense = math.prod(by_axis[axis] for axis in layout.axes)
    inside = by_axis["dp_shard"] * by_axis["cp"] * by_axis["tp"]
    if not 1 < dense <= processes or inside % (by_axis["ep"] * by_axis["etp"]):
        return None
    return Layout(**by_axis, order=layout.order)


def largest(layout: Layout) -> tuple[int, ...]:
    """Sorts layouts of equally many axes: degrees of 2 first, few processes before many."""
    degrees = [layout.degree(axis) for axis in SHORT]
    return (-sum(degree > 2 for degree in degrees), -layout.world_size)


def pairs(axes: Iterable[Any]) -> set[Pair]:
    """Every one and every two of them."""
    names = list(axes)
    return {frozenset(each) for size in (1, 2) for each in itertools.combinations(names, size)}


def cover(
    wanted: set[Pair], candidates: Sequence[Any], shows: Callable[[Any], set[Pair]], prefer: Callable[[Any], Any]
) -> list[Any]:
    """Few of the candidates that together show all of `wanted` that any of them shows; greedy, deterministic."""
    left, chosen = set(wanted), []
    while candidates:
        best = max(candidates, key=lambda each: (len(left & shows(each)), prefer(each)))
        if not left & shows(best):
            break
        left -= shows(best)
        chosen.append(best)
    return chosen


def missing(layout: Layout, chosen: Sequence[Layout]) -> Iterator[str]:
    """What the chosen layouts do not show of the whole one, in sentences."""
    axes = used(layout)
    shown = set().union(*(pairs(used(each)) for each in chosen))
    for axis in axes:
        degrees = sorted({each.degree(axis) for each in chosen} - {1})
        if degrees and layout.degree(axis) not in degrees:
            yield f"{short([axis])} {layout.degree(axis)} is verified at {' and '.join(map(str, degrees))}"
    for pair in sorted(pairs(axes) - shown, key=sorted):
        yield f"{short(axis for axis in axes if axis in pair)} needs {least(layout, pair)} processes"
    together = max((len(used(each)) for each in chosen), default=0)
    if together < len(axes):
        yield f"{short(axes)} together needs {least(layout, axes)} processes"


def least(layout: Layout, axes: Iterable[str]) -> int:
    """Processes of the smallest layout that has all of `axes`."""
    divisors = {axis: [n for n in range(1, layout.degree(axis) + 1) if layout.degree(axis) % n == 0] for axis in SHORT}
    options = [degrees[axis in axes and len(degrees) > 1 :][:3] for axis, degrees in divisors.items()]
    small = (fitting(layout, degrees, layout.world_size) for degrees in itertools.product(*options))
    return min(found.world_size for found in small if found is not None and set(axes) <= set(used(found)))


def every(axes: Sequence[str], processes: int, order: str) -> list[Layout]:
    """Layouts of degree 2 that combine every two of `axes`, and each axis alone, dense ones at 2 and at 4."""
    experts = [axis for axis in ("ep", "etp") if axis in axes]
    whole = placed({axis: 2 for axis in axes if axis not in experts}, order)
    options = [(1, 2) if axis in axes else (1,) for axis in SHORT]
    small = [found for degrees in itertools.product(*options) if (found := fitting(whole, degrees, processes))]
    chosen = cover(
        pairs([*used(whole), *experts, *(["efsdp"] if experts else [])]),
        small,
        lambda each: pairs(used(each)),
        prefer=lambda each: (len(used(each)), *largest(each)),
    )
    singles = [placed({axis: degree}, order) for axis in used(whole) for degree in (2, 4) if degree <= processes]
    shared = next((axis for axis in ("dp_shard", "tp", "cp") if axis in axes), "")
    singles += [placed({shared: 2, axis: 2}, order) for axis in experts if shared and processes > 1]
    return sorted({*chosen, *singles}, key=lambda each: (each.world_size, str(each)))


def placed(degrees: Mapping[str, int], order: str) -> Layout:
    given: dict[str, Any] = {**degrees, "order": order}
    return Layout(**given)


def micro_batches(layout: Layout, wanted: int, share: int) -> int:
    """How many pieces a share of `share` sequences is cut into: as `wanted`, within what the small batch allows."""
    limit = min(wanted, 2 * layout.pp if layout.pp > 1 else 2, share)
    return max(n for n in range(1, limit + 1) if share % n == 0)


def sampled(layouts: Sequence[Layout], engine: Any, sequences: int, allowed: Callable[[Case], bool]) -> list[Case]:
    """Each layout with options chosen so that few cases show every value of every option, and every two, that fit."""
    values = {name: literals(engine, name) for name in OPTIONS if literals(engine, name)}
    seen: set[Pair] = set()
    cases: list[Case] = []
    for layout in layouts:
        cases += _next(layout, values, sequences, seen, allowed)
    for name, options in values.items():
        for value in options:
            if frozenset([(name, value)]) not in seen:
                for layout in (each for each in layouts if matters(name, each)):
                    more = _next(layout, {**values, name: (value,)}, sequences, seen, allowed)
                    cases += more
                    if more:
                        break
    return cases


def _next(
    layout: Layout, values: dict[str, tuple[Any, ...]], sequences: int, seen: set[Pair], allowed: Callable[[Case], bool]
) -> list[Case]:
    """The allowed case of a layout that shows most that was not seen yet; its pairs join `seen`."""
    share = sequences // layout.data_ranks
    names = [name for name in values if matters(name, layout)]
    pieces = {micro_batches(layout, wanted, share) for wanted in ((2 * layout.pp,) if layout.pp > 1 else (1, 2))}
    candidates = [
        Case(layout, tuple(zip(names, chosen, strict=True)), micro)
        for chosen in itertools.product(*(values[name] for name in names))
        for micro in sorted(pieces)
    ]

    def shows(case: Case) -> set[Pair]:
        return pairs([*case.options, ("micro_batches", case.micro_batches > 1)])

    for case in sorted(candidates, key=lambda case: -len(shows(case) - seen)):
        if allowed(case):
            seen |= shows(case)
            return [case]
    return []


def matters(option: str, layout: Layout) -> bool:
    return any(layout.degree(axis) > 1 for axis in OPTIONS[option])


def literals(engine: Any, name: str) -> tuple[Any, ...]:
    """The values that an option of this engine may take on a CPU; empty where it has no such option."""
    want = hints(type(engine)).get(name)
    if want is bool:
        return (False, True)
    found = [get_args(each) for each in choices(want) if get_origin(each) is Literal] if want is not None else []
    return tuple(value for group in found for value in group if value not in ELSEWHERE)
