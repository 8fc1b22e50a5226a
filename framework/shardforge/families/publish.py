"""A model section in the words of a published family: which family can say it, and the config.json that it writes.

A family only proposes a config.json. It counts when the reader of the same family makes of it a model that computes
the same, field by field; so what a family has no word for is an error that names it, never a silently different model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.family import Family, families
from shardforge.families.section import apart, whole
from shardforge.families.settings import Settings

PROPOSAL = Path("config.json")
NAMELESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""A section knows no tokens by name, and an architecture would take its own where config.json is silent."""
SHOWN = 6


@dataclass(frozen=True)
class Published:
    family: Family
    config: dict[str, Any]  # config.json; "architectures" names the class
    left: tuple[str, ...] = ()  # what only training computes and config.json has no word for, a line each


def publish(section: Mapping[str, Any], where: object, first: str | None = None) -> Published:
    """The family that says a whole model section exactly, that of the architecture `first` before all others.
    CheckpointError naming the fields that the nearest one cannot say, when there is none."""
    nearest: tuple[int, str, list[str]] | None = None
    for name, family in _once(first):
        try:
            config = NAMELESS | family.config(dict(section))
            settings = Settings(config, PROPOSAL)
            again = whole(family.model(settings), PROPOSAL)
            meant = family.held(dict(section)) if family.held else section
        except (ForgeError, KeyError, TypeError, AttributeError, ValueError, IndexError, StopIteration):
            continue  # its architecture has nothing of the kind
        lines = [*_refused(settings), *_unlike(apart(meant, again))]
        if not lines:
            return Published(family, config, tuple(_unlike(apart(meant, again, training=True))))
        if nearest is None or len(lines) < nearest[0]:
            nearest = len(lines), name, lines
    if nearest is None:
        what = "no published family has these kinds of layers"
        raise CheckpointError(what, where, f"known are {', '.join(families())}")
    count, name, lines = nearest
    more = [f"and {count - SHOWN} more"] if count > SHOWN else []
    told = "\n".join(f"      {line}" for line in [*lines[:SHOWN], *more])
    raise CheckpointError(f"no published family can say this model; {name} comes nearest, but:\n{told}", where)


def _once(first: str | None) -> Iterator[tuple[str, Family]]:
    """Each family under one of its architectures, that of `first` before the others."""
    known, seen = families(), set()
    for name in sorted(known, key=lambda each: each != first):
        if id(known[name]) not in seen:
            seen.add(id(known[name]))
            yield name, known[name]


def _refused(settings: Settings) -> list[str]:
    """What the reader of a family says of its own proposal, a line each."""
    try:
        settings.settle()
    except Problems as problems:
        return [problem.what for problem in problems.problems]
    return []


def _unlike(fields: list[tuple[str, Any, Any]]) -> list[str]:
    return [f"{field}: {ours!r} here, {theirs!r} there" for field, ours, theirs in fields]
