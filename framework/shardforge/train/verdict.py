"""From the pulses of all ranks to one sentence: who waits, in which collective, for whom, and what those are doing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import psutil

from shardforge.core.errors import EngineError
from shardforge.core.layout import SHORT, Layout
from shardforge.train.place import Place

SHOWN = 8
"""Ranks described one by one; the others are only named."""
STOPPED = "was stopped by a signal"
LOST_CONTACT = "lost contact in"
AGAIN = "start again: the run resumes from its last checkpoint"


@dataclass(frozen=True)
class Paced:
    """Sums over the steps of a rank's life; see pace.py."""

    steps: int = 0
    seconds: float = 0.0
    worked: float = 0.0  # of these, outside of collectives
    data: float = 0.0  # of these, waiting for the batch
    rate: float = 0.0  # FLOP/s of its device at the last probe; 0 on a CPU


@dataclass(frozen=True)
class Pulse:
    """What a rank last said of itself."""

    rank: int
    host: str
    pid: int
    born: float  # creation time of the process, as psutil tells it
    count: int  # grows by one with each pulse
    idle: float  # seconds without movement
    place: Place
    left: bool = False  # it has finished its work and said goodbye
    node: str = ""  # as the scheduler calls it
    pace: Paced = Paced()


@dataclass(frozen=True)
class Standing:
    """One rank as another sees it."""

    rank: int
    pulse: Pulse | None
    state: str = "alive"  # or "dead", "frozen"
    words: str = ""  # why it is thought to be dead or frozen

    @property
    def stopped(self) -> bool:
        """Whether a signal has done it, not its node."""
        return self.words.endswith(STOPPED)

    @property
    def waits(self) -> bool:
        return self.state == "alive" and self.pulse is not None and bool(self.pulse.place.runs)


@dataclass(frozen=True)
class Scene:
    """All ranks at one moment, seen from rank `here`. `begun` is how its error begins: "waited 600 s in"."""

    layout: Layout
    here: int
    begun: str
    ranks: Mapping[int, Standing] = field(default_factory=dict)
    lost_store: str = ""  # why nothing is known of the others
    _absent: dict[tuple[object, ...], list[int]] = field(default_factory=dict)

    def absent(self, waiter: int) -> list[int]:
        """Ranks that belong to the collective of `waiter` and are not in it."""
        there = self.place(waiter)
        key = there.operation, there.runs
        if key not in self._absent:
            self._absent[key] = [rank for rank in there.members if not self._joins(rank, there)]
        return self._absent[key]

    def _joins(self, rank: int, there: Place) -> bool:
        return self.ranks[rank].waits and self.place(rank).waits_with(there)

    def place(self, rank: int) -> Place:
        pulse = self.ranks[rank].pulse
        return pulse.place if pulse is not None else Place()

    def subject(self) -> int | None:
        """The waiting rank nearest to `here` that waits for one which waits for nobody: there the cause is."""
        order, seen = [self.here, *self.ranks], set()
        for start in order:
            queue = [start]
            while queue:
                rank = queue.pop(0)
                if rank in seen or not self.ranks[rank].waits:
                    continue
                seen.add(rank)
                missing = self.absent(rank)
                if any(not self.ranks[other].waits for other in missing):
                    return rank
                queue += missing
        return next((rank for rank in order if self.ranks[rank].waits and self.absent(rank)), None)


def standing(rank: int, before: Pulse | None, now: Pulse | None, host: str, closed: bool = False) -> Standing:
    """A rank by two of its pulses between which a living one would have sent another. `closed`: a connection was."""
    if now is None:
        return Standing(rank, now, "frozen", "it has never given a sign of life")
    owner = f"process {now.pid} on {now.host}"
    if now.left:
        return Standing(rank, now, "dead", f"{owner} has finished and left")
    if now.host == host:
        status = _status(now)
        if status is None:
            return Standing(rank, now, "dead", f"{owner} is gone")
        if status == psutil.STATUS_STOPPED:
            return Standing(rank, now, "frozen", f"{owner} {STOPPED}")
    if before is not None and before.count == now.count and closed and now.host != host:
        return Standing(rank, now, "dead", f"{owner} gives no sign of life, and a connection was closed: it is gone")
    if before is not None and before.count == now.count:
        return Standing(
            rank, now, "frozen", f"no sign of life from {owner}; its process, its node or its network hangs"
        )
    return Standing(rank, now)


def _status(pulse: Pulse) -> str | None:
    """Of the process on this machine that sent a pulse; None when it is no more."""
    try:
        process = psutil.Process(pulse.pid)
        if abs(process.create_time() - pulse.born) > 1 or process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.status()
    except psutil.NoSuchProcess:
        return None


def end_frozen(ranks: Iterable[Standing], host: str) -> None:
    """SIGKILL to the frozen ranks of this machine: nothing else would end them, and a job for them is no more."""
    for each in ranks:
        said = each.pulse
        if each.state == "frozen" and said and said.host == host and said.pid != os.getpid() and _status(said):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(said.pid, signal.SIGKILL)


def verdict(scene: Scene, where: Path) -> EngineError:
    """The one error of a job in which a rank waited in vain. `where` is its run directory."""
    if scene.lost_store:
        own = described(scene.layout, scene.place(scene.here))
        what = f"{named(scene.layout, [scene.here])} {scene.begun} {own}\n  {scene.lost_store}"
        return EngineError(what, where, f"look for what ended that process or its node, and {AGAIN}")
    subject = scene.subject()
    if subject is None:
        return _nobody(scene, where)
    missing = scene.absent(subject)
    waiting = [rank for rank in scene.place(subject).members if rank not in missing]
    begun = scene.begun if scene.here in waiting else _since(scene, subject)
    lines = [
        f"{named(scene.layout, waiting)} {begun} {described(scene.layout, scene.place(subject))}, "
        f"for {named(scene.layout, missing)}",
        *(f"  {_told(scene, rank)}" for rank in missing[:SHOWN]),
    ]
    behind = [rank for rank in scene.ranks if rank not in missing and rank not in waiting and scene.ranks[rank].waits]
    if behind:
        lines.append(
            f"  {named(scene.layout, behind[:SHOWN])}{' and others' if len(behind) > SHOWN else ''} "
            f"wait{'s' * (len(behind) == 1)} behind them in {described(scene.layout, scene.place(behind[0]))}"
        )
    return EngineError("\n".join(lines), where, _fix([scene.ranks[rank] for rank in missing]))


def _nobody(scene: Scene, where: Path) -> EngineError:
    """No rank waits in a collective, or all are in the same one."""
    lines = [f"{named(scene.layout, [scene.here])} {scene.begun} {described(scene.layout, scene.place(scene.here))}"]
    lines += [f"  {_told(scene, rank)}" for rank in list(scene.ranks)[:SHOWN] if rank != scene.here]
    return EngineError("\n".join(lines), where, f"raise train.timeout if this may take so long, and {AGAIN}")


def _since(scene: Scene, rank: int) -> str:
    pulse = scene.ranks[rank].pulse
    return f"waited {pulse.idle:.0f} s in" if pulse is not None else "waited in"


def _told(scene: Scene, rank: int) -> str:
    each, who = scene.ranks[rank], named(scene.layout, [rank])
    if each.state != "alive":
        return f"{who} is {each.state}: {each.words}"
    assert each.pulse is not None
    if each.waits and each.rank not in scene.absent(scene.here):
        return f"{who} is there too: for {each.pulse.idle:.0f} s in {described(scene.layout, each.pulse.place)}"
    if each.waits:
        where = described(scene.layout, each.pulse.place)
        return f"{who} is in another collective: for {each.pulse.idle:.0f} s in {where}"
    return f"{who} is elsewhere: for {each.pulse.idle:.0f} s in {_elsewhere(each.pulse.place)}"


def _fix(missing: list[Standing]) -> str:
    states = {each.state for each in missing}
    if "dead" in states:
        return f"look for what ended that process (memory, a signal, its node) and {AGAIN}"
    if "frozen" in states:
        return f"look at that process and its node (a stopped process, a hanging driver or file system) and {AGAIN}"
    if any(not each.waits for each in missing):
        return f"raise train.timeout if what that rank does may take so long, else mend it, and {AGAIN}"
    return "all ranks must make the same calls in the same order: look for a branch that only some ranks take"


def described(layout: Layout, place: Place) -> str:
    """reduce_scatter over dp of block 3 in backward of step 17 (engine/native.py:66 in forward_backward)"""
    if not place.operation:
        return _elsewhere(place)
    unit = f" of {place.unit}" if place.unit else ""
    call = f" (its call {place.call})" if place.call else ""
    return f"{place.operation} over {axes(layout, place)}{unit}{_during(place)}{_at(place.line)}{call}"


def _elsewhere(place: Place) -> str:
    inner = f", in {place.leaf}" if place.leaf else ""
    return f"{place.line or 'a place outside of this program'}{inner}{_during(place)}"


def _during(place: Place) -> str:
    part = f" in {place.part}" if place.part else ""
    step = f" {'of' if part else 'in'} step {place.step}" if place.step is not None else ""
    return f"{part}{step}"


def _at(line: str) -> str:
    return f" at {line}" if line else ""


def axes(layout: Layout, place: Place) -> str:
    """What the members of a group differ in: "tp", "rep x dp", "all ranks"."""
    name = place.group.removeprefix("mesh_")
    if name in SHORT and place.group != name:
        return SHORT[name]
    spots = [layout.coordinates(rank) for rank in place.members]
    varying = [axis for axis in layout.axes if len({spot[axis] for spot in spots}) > 1]
    if len(varying) > 1 and len(place.members) == layout.world_size:
        return "all ranks"
    if prod(layout.degree(axis) for axis in varying) == len(place.members):
        return " x ".join(SHORT.get(axis, axis) for axis in varying)
    return name if place.group != name else f"ranks {', '.join(map(str, place.members))}"


def spot(layout: Layout, rank: int) -> str:
    """Coordinates of a rank along the axes that split something: "pp1 dp3 tp0"."""
    parts = [f"{SHORT.get(axis, axis)}{at}" for axis, at in layout.coordinates(rank).items() if layout.degree(axis) > 1]
    return " ".join(parts) or "alone"


def named(layout: Layout, ranks: list[int]) -> str:
    """rank 3 (dp1 tp1) and rank 5 (dp2 tp1); many are only numbers."""
    if len(ranks) > SHOWN:
        return f"ranks {', '.join(map(str, ranks[:SHOWN]))} and {len(ranks) - SHOWN} more"
    each = [f"rank {rank} ({spot(layout, rank)})" for rank in ranks]
    return " and ".join([", ".join(each[:-1]), each[-1]] if len(each) > 1 else each)
