"""Which nodes are slow, from measurements of pairs: a slow node makes its partner look slow, until that meets another.

First all nodes in disjoint pairs. Whoever is below the threshold, or was left over, then meets nodes that are known to
be fast: only what is slow there as well is slow itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from shardforge.launch.preflight_config import PreflightConfig

ROUNDS = 5
"""Of pairs, at most; one is usual where all are well."""
PROOFS = 2
"""Fast nodes with which a slow one was slow: networks of others who work there as well are noisy."""


@dataclass(frozen=True)
class Rate:
    """One measurement between nodes, or inside of one."""

    nodes: tuple[str, ...]
    gb_s: float  # 0 where there was an error
    error: str = ""

    def __str__(self) -> str:
        return self.error or f"{self.gb_s:.3g} GB/s"


def best(rates: Iterable[Rate]) -> dict[str, float]:
    """The most that each node has reached."""
    found: dict[str, float] = {}
    for rate in rates:
        for node in rate.nodes:
            found[node] = max(found.get(node, 0.0), rate.gb_s)
    return found


def threshold(reached: Mapping[str, float], floor: float, share: float) -> float:
    """GB/s below which a node is slow: the floor, or the share of what half of the nodes reach."""
    usual = statistics.median_high(reached.values()) if reached else 0.0
    return max(floor, share * usual)


def suspects(nodes: Sequence[str], rates: Sequence[Rate], config: PreflightConfig) -> list[str]:
    """Nodes that no measurement has shown to be fast."""
    reached = best(rates)
    least = threshold(reached, config.pair_gb_s, config.share)
    return [node for node in nodes if not reached.get(node, 0.0) or reached[node] < least]


def next_pairs(nodes: Sequence[str], rates: Sequence[Rate], config: PreflightConfig) -> list[tuple[str, str]]:
    """Disjoint pairs to measure next, the first of each the one to confirm; empty when nothing more can be learned."""
    met = {frozenset(rate.nodes) for rate in rates}
    if len(nodes) == 3:  # one pair does not tell what is usual: all three do
        return next(([pair] for pair in combinations(nodes, 2) if frozenset(pair) not in met), [])
    if not rates:
        half = len(nodes) // 2
        return list(zip(nodes[:half], nodes[half : 2 * half], strict=True))  # far apart: across the top of the network
    doubted = suspects(nodes, rates, config)
    fast = [node for node in nodes if node not in doubted]
    if not fast:
        return [] if len(nodes) == 2 else _left_over(nodes, rates)
    pairs, free = [], list(fast)
    for node in doubted:
        proofs = sum(frozenset((node, other)) in met for other in fast)
        other = next((other for other in free if frozenset((node, other)) not in met), None)
        if proofs < PROOFS and other is not None:
            pairs.append((node, other))
            free.remove(other)
    return pairs


def _left_over(nodes: Sequence[str], rates: Sequence[Rate]) -> list[tuple[str, str]]:
    """Where nobody was fast, whoever has met nobody yet may still be, and so may be those who met only one."""
    alone = [node for node in nodes if not any(node in rate.nodes for rate in rates)]
    if alone:
        return [(alone[0], next(node for node in nodes if node != alone[0]))]
    met = {frozenset(rate.nodes) for rate in rates}
    shifted = [*nodes[1:], nodes[0]]
    pairs, used = [], set[str]()
    for pair in zip(nodes, shifted, strict=True):
        if frozenset(pair) not in met and not used & {*pair}:
            pairs.append(pair)
            used |= {*pair}
    return pairs


def slow(nodes: Sequence[str], rates: Sequence[Rate], config: PreflightConfig) -> dict[str, str]:
    """{node: why it is slow} after all rounds of pairs."""
    reached = best(rates)
    least = threshold(reached, config.pair_gb_s, config.share)
    return {
        node: f"{_with_whom(node, rates)}; {_asked(least, config.pair_gb_s, config.share, reached)}"
        for node in suspects(nodes, rates, config)
        if node in reached
    }


def slow_inside(rates: Sequence[Rate], config: PreflightConfig) -> dict[str, str]:
    """{node: why} of nodes whose own GPUs are slow together."""
    reached = best(rates)
    least = threshold(reached, config.inside_gb_s, config.share)
    return {
        rate.nodes[0]: f"all-reduce among its GPUs: {rate}; {_asked(least, config.inside_gb_s, config.share, reached)}"
        for rate in rates
        if rate.error or rate.gb_s < least
    }


def _with_whom(node: str, rates: Sequence[Rate]) -> str:
    told = [f"with {other}: {rate}" for rate in rates if node in rate.nodes for other in rate.nodes if other != node]
    return "; ".join(told)


def _asked(least: float, floor: float, share: float, reached: Mapping[str, float]) -> str:
    if least == floor:
        return f"the floor is {floor:.3g} GB/s"
    return f"at least {least:.3g} GB/s is asked, {share:.0%} of what half of the nodes reach"
