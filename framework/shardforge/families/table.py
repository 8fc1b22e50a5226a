"""The names of a family of models beside ours: one row for each role, for all layers at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardforge.families.forms import SAME, Form

MARKS = {"layer": r"\d+", "depth": r"\d+", "leaf": r"\w+", "name": r".+"}


@dataclass(frozen=True)
class Row:
    """Weights of ours and of theirs that hold the same numbers in another `form`.

    Names are patterns: "blocks.{layer}.mixer.q.{leaf}", where the leaf is "weight" or "bias". With `each`, a mark of
    theirs that ours lack, theirs are as many as our first weight is long: "experts.{expert}.up_proj.weight" for expert
    0, 1, ...; all patterns of expert 0 come before those of expert 1.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form = SAME
    each: str = ""


def rows(names: Mapping[str, str], form: Form = SAME) -> tuple[Row, ...]:
    """Rows of one weight each, from pairs of module names like {"mixer.q": "self_attn.q_proj"} without their leaf."""
    return tuple(Row((f"{ours}.{{leaf}}",), (f"{theirs}.{{leaf}}",), form) for ours, theirs in names.items())


def layers(ours: str, theirs: str, roles: Mapping[str, str]) -> dict[str, str]:
    """The names of modules inside a layer with the names of the layer before them."""
    return {f"{ours}.{mine}": f"{theirs}.{yours}" for mine, yours in roles.items()}


def pattern(text: str) -> re.Pattern[str]:
    """The regular expression of a name with marks; each mark is a group."""
    pieces = re.split(r"\{(\w+)\}", text)
    marked = (re.escape(piece) if at % 2 == 0 else f"(?P<{piece}>{MARKS[piece]})" for at, piece in enumerate(pieces))
    return re.compile("".join(marked))
