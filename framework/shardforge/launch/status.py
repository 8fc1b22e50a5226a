"""The words of `shardforge status`: a page for a run, a line each for many, JSON for programs. 80 columns."""

from __future__ import annotations

import json
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardforge.core import units
from shardforge.launch.history import Attempt
from shardforge.launch.overview import Overview
from shardforge.launch.pace import Pace
from shardforge.launch.queue import Job

WIDTH, LABEL = 80, 12
SHOWN = 5
"""Restarts that a page tells of."""
HEADER = ("run", "state", "step", "done", "tokens/s", "left", "restarts", "news")


def page(seen: Overview, now: float) -> list[str]:
    """Lines of at most 80 columns about one run."""
    head = f"{seen.path}: {seen.state}" + (f" ({seen.why})" if seen.why else "")
    lines = textwrap.wrap(head, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    for label, text in _rows(seen, now):
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"  {label:<{LABEL}}",
            subsequent_indent=" " * (LABEL + 2),
            break_on_hyphens=False,
        )
    return lines


def _rows(seen: Overview, now: float) -> Iterator[tuple[str, str]]:
    if seen.owner:
        yield "process", seen.owner.removeprefix("process ")
    for index, job in enumerate(seen.jobs[:SHOWN]):
        yield "" if index else "jobs" if len(seen.jobs) > 1 else "job", job_words(job, now)
    if len(seen.jobs) > SHOWN:
        yield "", f"and {len(seen.jobs) - SHOWN} more"
    if seen.excluded:
        yield "without", seen.excluded
    if seen.layout:
        yield "layout", f"{seen.layout} on {seen.device}" if seen.device else seen.layout
    if seen.pace is not None:
        yield from _progress(seen, seen.pace, now)
    if seen.saved is not None:
        yield "checkpoint", f"step {seen.saved}{_ago(seen.saved_at, now, ', ')}"
    elif seen.pace is not None:
        yield "checkpoint", "none yet"
    if seen.attempts:
        yield from _restarts(seen.attempts, now)
    elif seen.starts > 1:
        yield "restarts", str(seen.starts - 1)
    if seen.verdict:
        place = f"; all of it is in {seen.verdict_page}" if seen.verdict_page else ""
        yield "verdict", f"{_ago(seen.verdict_at, now)}: {seen.verdict}{place}"


def _progress(seen: Overview, pace: Pace, now: float) -> Iterator[tuple[str, str]]:
    report, rates = pace.report, pace.rates
    if report is None or rates is None:
        yield "step", f"none yet{_ago(pace.news, now, '; last news ')}"
        return
    share = report.step / report.steps if report.steps else 1.0
    read = f", {units.count(report.tokens_seen)} tokens" if report.tokens_seen else ""
    loss = f"loss {report.loss:.4f}"
    yield "step", f"{report.step} of {report.steps} ({share:.1%}){read}, {loss}{_ago(pace.news, now, ', ')}"
    speed = f"{units.count(rates.tokens_per_s)} tokens/s, {units.seconds(rates.step_seconds)} a step"
    left = ""
    if report.step < report.steps:
        left = f"; {units.seconds(rates.eta_s)} left"
        left += f", until {_clock(now + rates.eta_s)}" if seen.state == "running" else " at that speed"
    yield "speed", speed + left


def _restarts(attempts: Sequence[Attempt], now: float) -> Iterator[tuple[str, str]]:
    later = attempts[1:]
    if not later:
        return
    kinds = Counter(each.reason.split(" ")[0].rstrip(":") or "unknown" for each in later)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    yield "restarts", f"{len(later)}: {told}"
    for each in later[-SHOWN:]:
        yield "", f"{_ago(each.time, now)}, {each.start}: {each.reason or 'no reason is known'}"


def job_words(job: Job, now: float) -> str:
    """4711 RUNNING on 4 nodes (node[1-4]), main, 3h12m left of 1d00h."""
    where = f"{job.nodes} node{'s' * (job.nodes != 1)}" + (f" ({job.node_list})" if job.node_list else "")
    if job.runs:
        limit = f" of {units.seconds(job.limit_s)}" if job.limit_s else ""
        left = f", {units.seconds(job.left_s)} left{limit}" if job.left_s is not None else ""
        return f"{job.id} {job.state} on {where}, {job.partition}{left}"
    expected = f", expected in {units.seconds(job.start - now)}" if job.start and job.start > now else ""
    after = f" after {job.dependency}" if job.dependency else ""
    return f"{job.id} {job.state} for {where}, {job.partition}: {job.reason or 'no reason given'}{after}{expected}"


def table(all_seen: Sequence[Overview], now: float) -> list[str]:
    """A header, and one line of at most 80 columns for each run."""
    rows = [HEADER, *(_row(seen, now) for seen in all_seen)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    widths[0] = max(3, min(widths[0], WIDTH - sum(widths[1:]) - 2 * (len(HEADER) - 1)))
    return ["  ".join(_fitted(row, widths)).rstrip() for row in rows]


def _fitted(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    name, state, *numbers = row
    yield (name if len(name) <= widths[0] else f"…{name[1 - widths[0] :]}").ljust(widths[0])
    yield state.ljust(widths[1])
    for number, width in zip(numbers, widths[2:], strict=True):
        yield number.rjust(width)


def _row(seen: Overview, now: float) -> tuple[str, ...]:
    pace, restarts = seen.pace, max(0, (len(seen.attempts) or seen.starts) - 1)
    news = "-" if pace is None else units.seconds(round(now - pace.news)) if now - pace.news >= 1 else "now"
    if pace is None or pace.report is None or pace.rates is None:
        return str(seen.path), seen.state, "-", "-", "-", "-", str(restarts), news
    report, rates = pace.report, pace.rates
    share = f"{report.step / report.steps:.0%}" if report.steps else "-"
    moving = seen.state in ("running", "stopping")
    speed = units.count(rates.tokens_per_s) if moving else "-"
    left = units.seconds(rates.eta_s) if report.step < report.steps else "-"
    return str(seen.path), seen.state, str(report.step), share, speed, left, str(restarts), news


def as_json(all_seen: Sequence[Overview]) -> str:
    """A list of objects; numbers that are not finite are null."""
    return json.dumps([_plain(seen) for seen in all_seen], indent=1, default=_simple, allow_nan=False)


def _plain(seen: Overview) -> dict[str, Any]:
    report = seen.pace.report if seen.pace else None
    rates = seen.pace.rates if seen.pace else None
    return {
        "run": seen.path,
        "state": seen.state,
        "why": seen.why,
        "process": seen.owner,
        "layout": seen.layout,
        "device": seen.device,
        "step": report.step if report else None,
        "steps": report.steps if report else None,
        "loss": _finite(report.loss) if report else None,
        "tokens": report.tokens_seen if report else None,
        "tokens_per_s": _finite(rates.tokens_per_s) if rates else None,
        "step_s": _finite(rates.step_seconds) if rates else None,
        "left_s": _finite(rates.eta_s) if rates else None,
        "news": seen.pace.news if seen.pace else None,
        "checkpoint": {"step": seen.saved, "time": seen.saved_at},
        "excluded": seen.excluded,
        "jobs": [asdict(job) for job in seen.jobs],
        "attempts": [asdict(attempt) for attempt in seen.attempts],
        "verdict": {"text": seen.verdict, "time": seen.verdict_at, "page": seen.verdict_page},
    }


def _simple(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} has no place in JSON")


def _finite(value: float) -> float | None:
    return value if value - value == 0 else None


def _ago(then: float | None, now: float, before: str = "") -> str:
    if then is None:
        return ""
    return f"{before}{units.seconds(max(0, round(now - then)))} ago" if now - then >= 1 else f"{before}just now"


def _clock(when: float) -> str:
    return time.strftime("%a %d %b %H:%M", time.localtime(when))
