"""What a case came to, as data, as lines for people and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, get_args

from shardforge.core.layout import SHORT, Layout
from shardforge.core.units import count
from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe.schema import Recipe
from shardforge.verify.cases import Case
from shardforge.verify.compare import RTOL, Difference

Status = Literal["equal", "different", "failed", "refused"]

COLUMNS = {
    "loss": ("loss", "scored labels"),
    "terms": ("term",),
    "gradient": ("gradient",),
    "norm": ("gradient norm",),
    "weights": ("weight",),
    "experts": ("expert load", "remembered"),
    "state": ("optimizer state",),
    "copies": ("copies",),
    "optims": (),
    "resumed": (),
}
"""Columns of the table -> the kinds of numbers that each sums up; held-out loss is a loss."""


@dataclass
class Verdict:
    """What one case came to. Errors are relative; the worst of each kind."""

    case: Case
    status: Status = "equal"
    errors: dict[str, float] = field(default_factory=dict)
    optimizers: dict[str, float] = field(default_factory=dict)
    resumed: tuple[str, float] | None = None  # the layout that went on from this one's checkpoint
    first: str = ""  # weight, as the forward pass meets them
    last: str = ""
    worst: str = ""  # the first thing that differs, in words
    rule: str = ""
    cause: str = ""
    details: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    recipe: str
    model: dict[str, Any]
    verdicts: list[Verdict]
    unproved: list[str]

    @property
    def exit_code(self) -> int:
        """0 all equal, 1 something differs or fails, 2 a layout was refused."""
        states = {each.status for each in self.verdicts}
        return 1 if states & {"different", "failed"} else 2 if "refused" in states else 0


def sizes(small: Recipe) -> dict[str, Any]:
    model = build(small.model, small.objective.build())
    return {
        "layers": list(small.model.layers),
        "hidden": small.model.hidden,
        "vocab": small.model.vocab,
        "seq_len": small.train.seq_len,
        "sequences": small.train.sequences,
        "weights": sum(item.count for item in declared(model)),
    }


def introduction(report: Report, listed: Sequence[Case]) -> str:
    """The first line: what is held against what, and how small the model is."""
    model, layouts = report.model, len({case.layout for case in listed})
    orders = {case.layout.order for case in listed} - {Layout().order}
    numbered = f", ranks numbered {' and '.join(sorted(orders))}" if orders else ""
    return (
        f"{report.recipe}: {layouts} layout{'s' * (layouts != 1)} against one process, in float64 to {RTOL:g} of the "
        f"norm,\non a small model of the same kinds: {count(model['weights'])} weights, hidden {model['hidden']}, "
        f"layers {stacked(model['layers'])};\n{model['sequences']} sequences of {model['seq_len']} tokens{numbered}\n"
    )


def stacked(layers: Sequence[str]) -> str:
    """ "dense x 2, moe x 2"."""
    runs = [(name, len(list(group))) for name, group in groupby(layers)]
    return ", ".join(f"{name} x {times}" if times > 1 else name for name, times in runs)


def header(listed: Sequence[Case]) -> str:
    return "  ".join([f"{'layout':<{width(listed)}}", *(f"{name:>9}" for name in COLUMNS), "verdict"])


def row(verdict: Verdict, listed: Sequence[Case]) -> str:
    """Worst relative errors of one case; a dash for what the recipe does not have or what was not reached."""
    errors = verdict.errors
    found = {column: [errors[each] for each in rows if each in errors] for column, rows in COLUMNS.items()}
    found["optims"] = list(verdict.optimizers.values())
    found["resumed"] = [verdict.resumed[1]] if verdict.resumed else []
    cells = [f"{max(errors):9.0e}" if errors else f"{'-':>9}" for errors in found.values()]
    return "  ".join([f"{verdict.case!s:<{width(listed)}}", *cells, verdict.status])


def width(listed: Sequence[Case]) -> int:
    return max(len("layout"), *(len(str(case)) for case in listed))


def conclusion(report: Report) -> str:
    """Everything after the table: what differs and why, what stays unproved, and the verdict in one sentence."""
    parts = [explanation(each) for each in report.verdicts if each.status != "equal"]
    if shared := pattern(report.verdicts):
        parts.append(shared)
    if report.unproved:
        parts.append("not proved here:\n" + "\n".join(f"  {text}" for text in report.unproved))
    parts.append(sentence(report))
    return "\n" + "\n".join(parts)


def explanation(verdict: Verdict) -> str:
    """A few lines on one case that is not equal."""
    if verdict.status in ("failed", "refused"):
        return f"{verdict.case} {verdict.status}: {verdict.worst}"
    lines = [f"{verdict.case} differs: {verdict.worst}"]
    if verdict.first:
        lines.append(f"  first weight that differs, as the forward pass meets them: {verdict.first}")
    if verdict.last not in ("", verdict.first):
        lines.append(f"  last one, which the backward pass meets first: {verdict.last}")
    return "\n".join([*lines, f"  likely cause: {verdict.cause}"])


def pattern(verdicts: Sequence[Verdict]) -> str:
    """What the layouts that differ have in common, and the others have not."""
    bad = [each for each in verdicts if each.status in ("different", "failed")]
    good = [each for each in verdicts if each.status == "equal"]
    if not bad or not good:
        return ""
    common = [axis for axis in SHORT if all(each.case.layout.degree(axis) > 1 for each in bad)]
    alone = [axis for axis in common if all(each.case.layout.degree(axis) == 1 for each in good)]
    marks = [f"{SHORT[axis]} > 1" for axis in alone]
    options = set.intersection(*(set(each.case.options) for each in bad))
    marks += [f"{k}={v}".lower() for k, v in sorted(options) if not any((k, v) in each.case.options for each in good)]
    return f"every case with {' or '.join(marks)} differs, and no other" if marks else ""


def sentence(report: Report) -> str:
    counts = {status: sum(each.status == status for each in report.verdicts) for status in get_args(Status)}
    total = len(report.verdicts)
    if counts["equal"] == total:
        return f"verified: {'the case equals' if total == 1 else f'all {total} cases equal'} one process"
    told = [f"{number} {status}" for status, number in counts.items() if number]
    return f"not verified: {', '.join(told)} of {total} case{'s' * (total > 1)}"


def as_json(report: Report) -> dict[str, Any]:
    """For CI; errors that are not finite are null."""

    def plain(number: float) -> float | None:
        return number if math.isfinite(number) else None

    def one(verdict: Verdict) -> dict[str, Any]:
        return {
            "layout": str(verdict.case.layout),
            "options": dict(verdict.case.options),
            "micro_batches": verdict.case.micro_batches,
            "status": verdict.status,
            "errors": {name: plain(error) for name, error in verdict.errors.items()},
            "optimizers": {name: plain(error) for name, error in verdict.optimizers.items()},
            "resumed": {"layout": verdict.resumed[0], "error": plain(verdict.resumed[1])} if verdict.resumed else None,
            "first": verdict.first or None,
            "last": verdict.last or None,
            "worst": verdict.worst or None,
            "rule": verdict.rule or None,
            "cause": verdict.cause or None,
            "seconds": round(verdict.seconds, 3),
        }

    return {
        "recipe": report.recipe,
        "model": report.model,
        "tolerance": RTOL,
        "cases": [one(each) for each in report.verdicts],
        "unproved": report.unproved,
        "exit_code": report.exit_code,
    }


def described(each: Difference) -> str:
    subject = f"{each.what} {each.name}".strip()
    if each.got is None and each.want is not None and each.what != "copies":
        return f"{each.phase}: {subject} is missing"
    if each.want is None:
        return f"{each.phase}: {subject} is there, and one process has none"
    ratio = f", {each.ratio:.6g} times what it should be" if each.rest < 1e-6 else ""
    return f"{each.phase}: {subject} has relative error {each.error:.1e}{ratio}"
