"""The names of a family of models beside ours: one row for each role, for all layers at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardforge.families.forms import SAME, Form

MARKS = {"layer": r"\d+", "leaf": r"\w+"}


@dataclass(frozen=True)
class Row:
    """Weights of ours and of theirs that hold the same numbers in another `form`.

    Names are patterns: "blocks.{layer}.mixer.q.{leaf}", where the leaf is "weight" or "bias".
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = SAME


@dataclass(frozen=True)
class Place:
    """Where one weight of ours lies: in `theirs`, as part number `part` of what `form` makes of them."""

    theirs: tuple[str, ...]
    form: Form
    part: int


def rows(names: Mapping[str, str], form: Form = SAME) -> tuple[Row, ...]:
    """Rows of one weight each, from pairs of module names like {"mixer.q": "self_attn.q_proj"} without their leaf."""
    return tuple(Row((f"{ours}.{{leaf}}",), (f"{theirs}.{{leaf}}",), form) for ours, theirs in names.items())


def layers(ours: str, theirs: str, roles: Mapping[str, str]) -> dict[str, str]:
    """The names of modules inside a layer with the names of the layer before them."""
    return {f"{ours}.{mine}": f"{theirs}.{yours}" for mine, yours in roles.items()}


def places(table: Sequence[Row], names: Iterable[str]) -> Iterator[tuple[str, Place | None]]:
    """Where each of our weights lies; None for one that the table has no row for."""
    patterns = [(pattern(text), row, part) for row in table for part, text in enumerate(row.ours)]
    for name in names:
        hits = ((known.fullmatch(name), row, part) for known, row, part in patterns)
        hit = next(((match, row, part) for match, row, part in hits if match), None)
        if hit is None:
            yield name, None
            continue
        match, row, part = hit
        yield name, Place(tuple(text.format(**match.groupdict()) for text in row.theirs), row.form, part)


def pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a name with marks; each mark is a group."""
    pieces = re.split(r"\{(\w+)\}", text)
    marked = (re.escape(piece) if at % 2 == 0 else f"(?P<{piece}>{MARKS[piece]})" for at, piece in enumerate(pieces))
    return re.compile("".join(marked))
