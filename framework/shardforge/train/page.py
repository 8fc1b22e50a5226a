"""From the pulses of all ranks to what failure.json and verdict.txt say: a cause, whom to blame, and one page.

error: rank 0 (dp0) waited 600 s in all_reduce over dp of block 3 in backward of step 17, for rank 1 (dp1)
  rank 1 (dp1) is elsewhere: ...
    fix: ...

rank  place  node   process  state  idle   where
1     dp1    node2  4712     alive  601 s  data/loader.py:131 in batch of step 17
0     dp0    node1  4711     waits  600 s  all_reduce over dp ...

stack of rank 1 (dp1)
...
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardforge.train.failure import Blamed, Cause, Failure
from shardforge.train.verdict import Scene, Standing, described, named, spot, verdict

ROWS, STACKS = 256, 32
"""Ranks in the table, at most, and different stacks: those to blame come first."""
HEAD = ("rank", "place", "node", "process", "state", "idle", "where")


@dataclass(frozen=True)
class Found:
    """What a scene says of its cause."""

    cause: Cause
    ranks: tuple[int, ...]  # to blame
    step: int | None


def failure(scene: Scene, where: Path, stacks: Mapping[int, str], start: str) -> Failure:
    """What the rank that sees this scene says. `stacks` is as each rank told it; `where` is the run directory."""
    found = find(scene)
    blamed = tuple(Blamed(rank, _node(scene.ranks[rank]), _state(scene, rank)) for rank in found.ranks)
    return Failure(
        text=f"error: {verdict(scene, where)}",
        cause=found.cause,
        step=found.step,
        blamed=blamed,
        node=suspect(scene, found),
        page=page(scene, found, stacks, start),
    )


def find(scene: Scene) -> Found:
    if scene.lost_store:
        return Found("lost", (), scene.place(scene.here).step)
    subject = scene.subject()
    if subject is None:
        return Found("hang", (scene.here,), scene.place(scene.here).step)
    missing = scene.absent(subject)
    states = {scene.ranks[rank].state for rank in missing}
    at_fault = [rank for rank in missing if not scene.ranks[rank].waits] or missing
    cause: Cause = "order"
    if "dead" in states:
        cause = "dead"
    elif "frozen" in states:
        cause = "frozen"
    elif not all(scene.ranks[rank].waits for rank in missing):
        cause = "hang"
    step = scene.place(subject).step
    return Found(cause, tuple(at_fault), step if step is not None else scene.place(at_fault[0]).step)


def suspect(scene: Scene, found: Found) -> str | None:
    """The one node whose ranks give no sign of life, though nobody has stopped or ended them."""
    silent = [scene.ranks[rank] for rank in found.ranks if scene.ranks[rank].state == "frozen"]
    if found.cause != "frozen" or any(each.pulse is None or each.stopped for each in silent):
        return None
    nodes = {_node(each) for each in silent}
    return nodes.pop() if len(nodes) == 1 else None


def page(scene: Scene, found: Found, stacks: Mapping[int, str], start: str) -> str:
    """Below the sentence: when and who, a table of the ranks, and the stacks that differ."""
    order = [*found.ranks, *(rank for rank in scene.ranks if rank not in found.ranks)]
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    teller = f"told by rank {scene.here} of {scene.layout.world_size}, layout {scene.layout}"
    parts = [f"start {start}, {when}, {teller}", _table(scene, order), *_stacks(scene, order, stacks)]
    return "\n" + "\n\n".join(parts) + "\n"


def _table(scene: Scene, order: list[int]) -> str:
    rows = [HEAD, *(_row(scene, rank) for rank in order[:ROWS])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows]
    return "\n".join([*lines, *([f"and {len(order) - ROWS} more"] if len(order) > ROWS else [])])


def _row(scene: Scene, rank: int) -> tuple[str, ...]:
    each = scene.ranks[rank]
    pulse = each.pulse
    if pulse is None:
        return str(rank), spot(scene.layout, rank), "unknown", "", each.state, "", each.words
    where = described(scene.layout, pulse.place)
    told = f"{where} ({each.words})" if each.words else where
    state = "waits" if each.waits else each.state
    return str(rank), spot(scene.layout, rank), _node(each), str(pulse.pid), state, f"{pulse.idle:.0f} s", told


def _stacks(scene: Scene, order: list[int], stacks: Mapping[int, str]) -> list[str]:
    alike: dict[str, list[int]] = {}
    for rank in order:
        if rank in stacks:
            alike.setdefault(stacks[rank], []).append(rank)
    parts = []
    for text, ranks in list(alike.items())[:STACKS]:
        whose = f"stack of {named(scene.layout, ranks)}"
        parts.append(f"{whose}\n{text}")
    if len(alike) > STACKS:
        parts.append(f"and {len(alike) - STACKS} more stacks")
    silent = [rank for rank in order if rank not in stacks]
    return [*parts, *([f"no stack of {named(scene.layout, silent)}"] if silent else [])]


def _node(each: Standing) -> str:
    return (each.pulse.node or each.pulse.host) if each.pulse is not None else "unknown"


def _state(scene: Scene, rank: int) -> str:
    each = scene.ranks[rank]
    if each.state != "alive":
        return each.state
    return "astray" if each.waits else "elsewhere"
