"""The questions of a preflight, in order: clocks, facts, lanes, bandwidth. What comes back is judged elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardforge.launch import preflight_facts, preflight_rates
from shardforge.launch.preflight_checks import Finding, nodes
from shardforge.launch.preflight_desk import Desk
from shardforge.launch.preflight_facts import Facts
from shardforge.launch.preflight_node import lanes
from shardforge.launch.preflight_rates import Rate
from shardforge.launch.preflight_wanted import Wanted

CLOCKS = 3
"""Times that the clock is asked for; the quickest answer counts."""
MEASURE_S = 20.0
"""A measurement that takes longer is no measurement."""


@dataclass
class Survey:
    """All that was found out."""

    facts: dict[str, Facts] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pairs: list[Rate] = field(default_factory=list)
    inside: list[Rate] = field(default_factory=list)
    together: Rate | None = None
    broken: str = ""  # what does not work although no node can be named
    warnings: list[str] = field(default_factory=list)


def conduct(desk: Desk, wanted: Wanted, token: str, addresses: Mapping[str, str]) -> Survey:
    """Ask all nodes that have come. `addresses` replaces what the desk sees of a node, such as of the first one."""
    survey, patience = Survey(), wanted.config.patience_s
    desk.ask("begin", patience, wanted=dataclasses.asdict(wanted))
    offsets = clocks(desk, patience)
    for node, answer in desk.ask("facts", patience, token=token).items():
        if answer.error:
            survey.findings.append(Finding(node, "facts", f"cannot look at itself: {answer.error}"))
            continue
        own = preflight_facts.from_plain(answer.value)
        ahead, unsure = offsets.get(node, (0.0, 0.0))
        survey.facts[node] = dataclasses.replace(own, clock_s=ahead, clock_error_s=unsure)
    if lanes(wanted):
        _lanes(desk, wanted, survey)
        _bandwidth(_Meter(desk, wanted, {**desk.addresses, **addresses}), survey)
    survey.findings += [Finding(node, "silent", why) for node, why in desk.lost.items()]
    return survey


def clocks(desk: Desk, patience_s: float) -> dict[str, tuple[float, float]]:
    """{node: (seconds ahead of the desk, how far off that may be)}: an answer was given between its question and its
    arrival, so halfway, give or take half the time."""
    found: dict[str, tuple[float, float]] = {}
    for _ in range(CLOCKS):
        for node, answer in desk.ask("clock", patience_s).items():
            unsure = (answer.received - answer.sent) / 2
            if not answer.error and (node not in found or unsure < found[node][1]):
                found[node] = (answer.value - (answer.sent + answer.received) / 2, unsure)
    return found


def _lanes(desk: Desk, wanted: Wanted, survey: Survey) -> None:
    """Wait for the lanes; a GPU that does not work is found here, and the versions of what is loaded."""
    patience = wanted.config.patience_s
    hello = [{"ask": "hello"}] * lanes(wanted)
    answers = desk.ask("lanes", 1.5 * patience, {node: hello for node in _fit(desk, wanted, survey)}, limit_s=patience)
    for node, answer in answers.items():
        errors = [answer.error] if answer.error else errors_of(answer.value, wanted)
        if errors:
            survey.findings.append(Finding(node, "start", errors[0]))
        else:
            of = survey.facts[node]
            survey.facts[node] = dataclasses.replace(of, versions={**of.versions, **answer.value[0]["versions"]})


def _fit(desk: Desk, wanted: Wanted, survey: Survey) -> list[str]:
    """Nodes with which nothing is wrong so far."""
    wrong = {each.node for each in (*survey.findings, *nodes(wanted, desk.nodes, survey.facts))}
    return [node for node in desk.present if node in survey.facts and node not in wrong]


def errors_of(told: Sequence[Mapping[str, Any]], wanted: Wanted) -> list[str]:
    what = "GPU {}: " if wanted.checks_gpus else ""
    return [what.format(number) + each["error"] for number, each in enumerate(told) if each.get("error")]


def _bandwidth(meter: _Meter, survey: Survey) -> None:
    """Inside each node, between nodes in rounds of pairs, then over all that are still good."""
    wanted, desk = meter.wanted, meter.desk
    config = wanted.config
    if not config.measured:
        return
    left = _fit(desk, wanted, survey)
    if meter.lanes > 1:
        survey.inside = meter.all_reduce([[node] for node in left])
        bad = preflight_rates.slow_inside(survey.inside, config)
        survey.findings += [Finding(node, "inside", why) for node, why in bad.items() if node in desk.present]
        left = [node for node in left if node in desk.present and node not in bad]
    for _ in range(preflight_rates.ROUNDS):
        pairs = preflight_rates.next_pairs(left, survey.pairs, config) if len(left) > 1 else []
        if not pairs:
            break
        survey.pairs += meter.pairs(pairs)
    bad = preflight_rates.slow(left, survey.pairs, config)
    survey.findings += [Finding(node, "pairs", why) for node, why in bad.items() if node in desk.present]
    left = [node for node in left if node in desk.present and node not in bad]
    if len(left) > 1:
        rate = survey.together = meter.all_reduce([left], max(MEASURE_S, config.patience_s))[0]
        what, floor = f"the all-reduce over {len(left)} nodes", config.all_reduce_gb_s
        if rate.error:
            survey.broken = f"{what} failed, though each pair works: {rate.error}"
        elif rate.gb_s < floor:
            survey.warnings.append(f"{what} reaches {rate}, the floor is {floor:.3g} GB/s; no node can be named for it")


@dataclass
class _Meter:
    """Measures groups of nodes, several at the same time."""

    desk: Desk
    wanted: Wanted
    addresses: Mapping[str, str]
    count: int = 0

    @property
    def lanes(self) -> int:
        return lanes(self.wanted)

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Rate]:
        """Each lane of a node with the lane of the same number of its partner, all at once; the sum over lanes."""
        ports = self._open({first: self.lanes for first, _ in pairs})
        own: dict[str, list[dict[str, Any]]] = {}
        for first, second in pairs:
            for rank, node in enumerate((first, second)):
                own[node] = [
                    self._question("pair", first, port, rank, 2, f"{first}/{lane}", MEASURE_S)
                    for lane, port in enumerate(ports.get(first, ()))
                ]
        return self._measure(pairs, own, sum, MEASURE_S)

    def all_reduce(self, groups: Sequence[Sequence[str]], limit_s: float | None = None) -> list[Rate]:
        """Over all lanes of the nodes of each group."""
        limit = limit_s or MEASURE_S
        ports = self._open({group[0]: 1 for group in groups})
        own: dict[str, list[dict[str, Any]]] = {}
        for group in groups:
            first, size = group[0], len(group) * self.lanes
            for index, node in enumerate(group):
                own[node] = [
                    self._question("all_reduce", first, port, index * self.lanes + lane, size, first, limit)
                    for port in ports.get(first, ())
                    for lane in range(self.lanes)
                ]
        return self._measure(groups, own, min, limit)

    def _open(self, counts: Mapping[str, int]) -> dict[str, list[int]]:
        """{node: port of each of its first lanes}, where groups of this round meet."""
        self.count += 1
        own = {
            node: [{"ask": "open", "address": self.addresses[node]} for _ in range(count)]
            for node, count in counts.items()
        }
        answers = self.desk.ask("lanes", MEASURE_S + SLACK_S, own, limit_s=MEASURE_S)
        return {
            node: [each["port"] for each in answer.value]
            for node, answer in answers.items()
            if not answer.error and all("port" in each for each in answer.value)
        }

    def _question(
        self, op: str, first: str, port: int, rank: int, size: int, key: str, limit_s: float
    ) -> dict[str, Any]:
        return {
            "ask": "measure", "op": op, "address": self.addresses[first], "port": port, "rank": rank, "size": size,
            "key": f"{self.count}/{key}", "bytes": self.wanted.config.message_bytes, "timeout_s": limit_s - SLACK_S,
        }  # fmt: skip

    def _measure(
        self, groups: Sequence[Sequence[str]], own: Mapping[str, list[dict[str, Any]]], total: Any, limit_s: float
    ) -> list[Rate]:
        able = {node: questions for node, questions in own.items() if questions}
        answers = self.desk.ask("lanes", limit_s + SLACK_S, able, limit_s=limit_s)
        rates = []
        for group in groups:
            errors = []
            reached = []
            for node in group:
                if node not in answers:
                    errors.append(f"{node} {self.desk.lost.get(node, 'could not begin')}")
                elif answers[node].error:
                    errors.append(f"{node}: {answers[node].error}")
                else:
                    errors += [f"{node}: {each}" for each in errors_of(answers[node].value, self.wanted)]
                    reached.append(total(each.get("gb_s", 0.0) for each in answers[node].value))
            rates.append(Rate(tuple(group), 0.0 if errors else min(reached), errors[0] if errors else ""))
        return rates


SLACK_S = 5.0
"""By which each one that waits for another waits longer than that one."""
