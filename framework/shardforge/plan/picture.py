"""A schedule as text: one line a rank, time from left to right."""

from __future__ import annotations

from shardforge.plan.simulate import Span, Timeline

WIDTH = 120
GAP = " ~ "  # where the middle is left out


def picture(timeline: Timeline, width: int = WIDTH) -> list[str]:
    """Lines of at most `width` columns; where the whole does not fit, its beginning and its end."""
    label = 1 + len(str(timeline.micro_batches - 1))
    shortest = _shortest(timeline)
    names = [f"rank {rank}" for rank in range(timeline.ranks)]
    margin = max(len(name) for name in names) + 2
    room = width - margin
    scale = next(
        (columns / shortest for columns in (label + 1, label) if timeline.time / shortest * columns <= room),
        (label + 1) / shortest,
    )
    rows = ["".join(_drawn(row, timeline, scale)).rstrip() for row in timeline.spans]
    longest = max(len(row) for row in rows)
    lines, note = rows, ""
    if longest > room:
        head = (room - len(GAP)) * 2 // 3
        tail = room - len(GAP) - head
        lines = [f"{row[:head]:<{head}}{GAP}{row.ljust(longest)[-tail:]}".rstrip() for row in rows]
        left, right = head / scale, (longest - tail) / scale
        note = f"; shortened: {right - left:.4g} of {timeline.time:.4g} units of time are left out at the {GAP.strip()}"
    cells = [f"{name:<{margin}}{line}" for name, line in zip(names, lines, strict=True)]
    return [*cells, *_legend(timeline, round(scale * shortest), note)]


def _legend(timeline: Timeline, columns: int, note: str) -> list[str]:
    works = {span.action.work for row in timeline.spans for span in row}
    meaning = {"F": "F forward", "B": "B backward", "I": "I input gradient", "W": "W weight gradient"}
    words = ", ".join(text for work, text in meaning.items() if work in works)
    lower = ["lower case: later stages of the rank"] if timeline.chunks > 1 else []
    return [
        f"{words}, with its micro-batch; . waits",
        *lower,
        f"the shortest action takes {columns} columns{note}",
    ]


def _drawn(row: tuple[Span, ...], timeline: Timeline, scale: float) -> list[str]:
    cells, place = [], 0
    end, step = round(timeline.time * scale), max(1, round(scale * _shortest(timeline)))
    for span in row:
        start, stop = round(span.start * scale), round(span.end * scale)
        cells.append(_waits(start - place, place, step))
        cells.append(_cell(name(span, timeline), stop - start))
        place = stop
    return [*cells, _waits(end - place, place, step)]


def name(span: Span, timeline: Timeline) -> str:
    """ "F3", or "f3" in a stage that is not the rank's first."""
    work = span.action.work
    return f"{work if span.action.stage < timeline.ranks else work.lower()}{span.action.micro}"


def _cell(text: str, columns: int) -> str:
    """The name, drawn out to the length of the action; one blank keeps it from the next where there is room."""
    if columns <= len(text):
        return text[:columns]
    return f"{text:-<{columns - 1}} "


def _waits(columns: int, place: int, step: int) -> str:
    """A dot for each of the shortest actions that would fit: bubbles are seen, and are not mistaken for work."""
    return "".join("." if (place + column) % step == 0 else " " for column in range(columns))


def _shortest(timeline: Timeline) -> float:
    return min(span.end - span.start for row in timeline.spans for span in row)
