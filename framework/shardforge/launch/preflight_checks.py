"""Facts of all nodes become a verdict: who is bad and why, or why no other nodes would help. Plain functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardforge.core import units
from shardforge.launch.preflight_facts import Facts
from shardforge.launch.preflight_wanted import Wanted

ENOUGH, FEW, STOP = 0, 3, 4
PLACE = frozenset({"run directory", "data", "disk"})
"""What one node alone cannot be blamed for."""
NETWORK = (
    *("nfs", "lustre", "gpfs", "beegfs", "ceph", "wekafs", "panfs", "orangefs", "pvfs"),
    *("cifs", "smb", "9p", "fuse", "virtiofs"),
)
"""File systems that several nodes can share, by how their type begins."""

FIX = "So many nodes are not sick at once: what the profile asks for, or the job's environment, is not what is there"
FIXES = {
    "silent": "Look at whether the nodes reach the first one (network environment of the profile, port, firewall)",
    "shared": "Put the run directory on a file system that all nodes share (`run_dir` of the recipe)",
    "run directory": "Mend its permissions, or choose another (`run_dir` of the recipe)",
    "disk": "Make room there, or choose another place (`run_dir` of the recipe)",
    "data": "Put the corpus where every node reads it, with the container's mounts (`data.sources` of the recipe)",
    "pairs": "Either the floor of the profile (`preflight.pair_gb_s`) is not of this network, or the network is sick",
}
"""What to do about a check that most nodes fail."""


@dataclass(frozen=True)
class Finding:
    node: str
    check: str  # "gpus", "clock", ...
    reason: str


@dataclass(frozen=True)
class Clock:
    """Time that is left, and what a stay of the run takes; None where nothing is known."""

    left_s: float | None = None
    step_s: float | None = None
    save_s: float | None = None


@dataclass(frozen=True)
class Verdict:
    code: int
    good: tuple[str, ...]  # in the order of the allocation
    bad: Mapping[str, tuple[str, ...]]  # node -> reasons
    stop: tuple[str, ...] = ()  # what other nodes would not repair
    warnings: tuple[str, ...] = ()
    short: str = ""  # why the run does not start on good nodes


def judge(
    wanted: Wanted,
    order: Sequence[str],
    facts: Mapping[str, Facts],
    others: Iterable[Finding] = (),
    clock: Clock | None = None,
    warnings: Iterable[str] = (),
    broken: str = "",
) -> Verdict:
    """`order` is the allocation, its first node the one that asked; `others` is what was found beside the facts,
    `broken` what does not work although no node can be named."""
    findings = [*others, *nodes(wanted, order, facts)]
    stop, left = common(findings, order, facts)
    bad: dict[str, tuple[str, ...]] = {}
    for each in left:
        bad[each.node] = (*bad.get(each.node, ()), each.reason)
    wrong = {each.node for each in findings}
    good = tuple(node for node in order if node in facts and node not in wrong)
    short, near_end = time_left(wanted, clock or Clock())
    short = broken or short
    if not stop and len(good) >= wanted.nodes and not short:
        code = ENOUGH
    else:
        code = STOP if stop else FEW
    told = (*warnings, *((near_end,) if near_end else ()))
    return Verdict(code, good, bad, stop, told, short)


def common(
    findings: Sequence[Finding], order: Sequence[str], facts: Mapping[str, Facts]
) -> tuple[tuple[str, ...], list[Finding]]:
    """(what is wrong on most nodes, and so not with them; the findings that are about single nodes)."""
    stop: list[str] = []
    left: list[Finding] = []
    for check in dict.fromkeys(each.check for each in findings):
        these = [each for each in findings if each.check == check]
        hit = list(dict.fromkeys(each.node for each in these))
        most = 2 * len(hit) > len(order) and (len(hit) > 1 or check in PLACE)
        if check == "shared":
            most = len(hit) == len(order) - 1 and not _unmounted(hit, order[0], facts)
        if most:
            stop.append(f"{_told(these, len(hit), len(order))}. {FIXES.get(check, FIX)}")
        else:
            left += these
    return tuple(stop), left


def _told(these: Sequence[Finding], hit: int, size: int) -> str:
    reason, times = Counter(each.reason for each in these).most_common(1)[0]
    first = next(each.node for each in these if each.reason == reason)
    where = f"on {hit} of {size} nodes: " if size > 1 else ""
    return f"{where}{reason}" + ("" if times == hit else f" (that is {first})")


def _unmounted(hit: Sequence[str], first: str, facts: Mapping[str, Facts]) -> bool:
    """Whether the run directory is shared, and these few nodes only lack the mount."""
    here = facts[first].filesystem if first in facts else ""
    return here.startswith(NETWORK) and all(facts[node].filesystem != here for node in hit) and len(hit) == 1


def nodes(wanted: Wanted, order: Sequence[str], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """What is wrong with each node that has told its facts."""
    config = wanted.config
    for node in order:
        if node not in facts:
            continue
        of = facts[node]
        yield from _gpus(node, of, wanted)
        if of.free_memory < config.free_memory:
            told = f"{units.bytes_(of.free_memory)} of memory are free, {units.bytes_(config.free_memory)} are asked"
            yield Finding(node, "memory", told)
        if not of.token:
            kind = f" ({of.filesystem})" if of.filesystem else ""
            yield Finding(node, "shared", f"the run directory{kind} is not the one that {order[0]} writes to")
        yield from _disk(node, of, wanted)
        for folder, error in of.data_errors.items():
            yield Finding(node, "data", f"{folder}: {error}")
    yield from _clocks(order, facts, config.clock_s)
    yield from _unequal(order, facts)


def _gpus(node: str, of: Facts, wanted: Wanted) -> Iterator[Finding]:
    if not wanted.checks_gpus:
        return
    if of.gpu_error:
        yield Finding(node, "gpus", of.gpu_error)
        return
    if len(of.gpus) < wanted.gpus:
        yield Finding(node, "gpus", f"{len(of.gpus)} GPUs are there, {wanted.gpus} are asked")
    for gpu in of.gpus:
        if gpu.used > wanted.config.gpu_used:
            told = f"GPU {gpu.index} is not idle: {units.bytes_(gpu.used)} of its memory are taken"
            yield Finding(node, "idle", told)
        if gpu.ecc:
            yield Finding(node, "ecc", f"GPU {gpu.index} had {gpu.ecc} uncorrected memory errors")


def _disk(node: str, of: Facts, wanted: Wanted) -> Iterator[Finding]:
    config = wanted.config
    if of.write_error:
        yield Finding(node, "run directory", f"the run directory cannot be written to: {of.write_error}")
        return
    if of.free_disk < config.free_disk:
        told = f"{units.bytes_(of.free_disk)} are free at the run directory, {units.bytes_(config.free_disk)} are asked"
        yield Finding(node, "disk", told)
    if of.write_bytes_s < config.write_mb_s * 1e6:
        told = f"writes {of.write_bytes_s / 1e6:.3g} MB/s to the run directory, {config.write_mb_s:.3g} are asked"
        yield Finding(node, "write speed", told)


def _clocks(order: Sequence[str], facts: Mapping[str, Facts], most_s: float) -> Iterator[Finding]:
    known = [node for node in order if node in facts]
    if not known:
        return
    ahead = {node: facts[node].clock_s for node in known}
    usual = statistics.median(ahead.values()) if len(known) > 2 else ahead[known[0]]
    for node in known:
        off = ahead[node] - usual
        if abs(off) - facts[node].clock_error_s > most_s:
            side = "ahead of" if off > 0 else "behind"
            told = f"its clock is {units.seconds(abs(off))} {side} the others, {units.seconds(most_s)} are allowed"
            yield Finding(node, "clock", told)


def _unequal(order: Sequence[str], facts: Mapping[str, Facts]) -> Iterator[Finding]:
    known = [node for node in order if node in facts]
    for name in sorted({name for node in known for name in facts[node].versions}):
        told = {node: facts[node].versions[name] for node in known if name in facts[node].versions}
        for node, own, usual in odd(told):
            yield Finding(node, name, f"{name} {own}, {usual} on the others")
    for folder in sorted({folder for node in known for folder in facts[node].data}):
        told = {node: facts[node].data[folder] for node in known if folder in facts[node].data}
        for node, own, usual in odd(told):
            yield Finding(node, "corpus", f"{folder} has the fingerprint {own}, {usual} on the others")


def odd(told: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(node, its value, the usual one) of nodes unlike most; of two values as frequent, the first node's is usual."""
    if not told:
        return
    usual = Counter(told.values()).most_common(1)[0][0]  # the first met, among equals
    yield from ((node, own, usual) for node, own in told.items() if own != usual)


def time_left(wanted: Wanted, clock: Clock) -> tuple[str, str]:
    """(why a start is not worth it, why it may lose work); each empty where there is no reason."""
    if clock.left_s is None:
        return "", ""
    left = units.seconds(max(0.0, clock.left_s))
    step, save = clock.step_s or 0.0, clock.save_s or 0.0
    if clock.left_s <= wanted.lead_s + save:
        told = f"{left} are left, the last save is asked for {units.seconds(wanted.lead_s)} before the end"
        return told + (f" and takes {units.seconds(save)}" if save else ""), ""
    if wanted.lead_s and save > wanted.lead_s:
        told = f"a save took {units.seconds(save)}, but is asked for only {units.seconds(wanted.lead_s)} before the end"
        return "", f"{told}: make the signal's lead longer"
    interval = wanted.checkpoint_every * step
    if interval + save > clock.left_s - wanted.lead_s:
        told = f"{left} are left, less than the {units.seconds(interval + save)} to the next checkpoint at this speed"
        return "", f"{told}: only the save before the end will be there"
    return "", ""
