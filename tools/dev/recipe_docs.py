"""Write docs/reference/recipe.md: every field of a recipe that is not a kind's own. `--check` only compares."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from zoo_docs import default, meaning, write_or_check

from shardforge.recipe.build import choices, hints, slot_of
from shardforge.recipe.schema import Recipe

TARGET = Path(__file__).resolve().parents[2] / "docs" / "reference" / "recipe.md"
HEAD = """# Recipe

Every section of a recipe and its fields. Written by `python tools/dev/recipe_docs.py` from the dataclasses that read
them; `shardforge show --schema` prints the same for editors, and [zoo.md](zoo.md) has the fields of the kinds.
"""


def page() -> str:
    """The whole document."""
    lines = [HEAD]
    for path, cls in sections(Recipe, ""):
        lines += [f"## {path or 'top level'}", "", "| field | type | default | meaning |", "|---|---|---|---|"]
        lines += [row(field, hints(cls)[field.name]) for field in dataclasses.fields(cls)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def sections(cls: type, path: str) -> Iterator[tuple[str, type]]:
    """Each section of plain fields with its dotted path; a section in a list or under names stands at `*`."""
    yield path, cls
    for name, want in hints(cls).items():
        inside = f"{path}.{name}".lstrip(".")
        for choice in choices(want):
            parts = [(choice, inside), *((item, f"{inside}.*") for item in get_args(choice))]
            for part, place in parts:
                if isinstance(part, type) and dataclasses.is_dataclass(part):
                    yield from sections(part, place)


def row(field: dataclasses.Field[Any], want: Any) -> str:
    cells = (f"`{field.name}`", type_of(field, want), preset(field), meaning(field.metadata))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def type_of(field: dataclasses.Field[Any], want: Any) -> str:
    """The type as it stands in the code; a slot is a link to its kinds."""
    slots = [slot_of(part) for part in (*choices(want), *get_args(want))]
    found = next((slot for slot in slots if slot is not None), None)
    return f"`{field.type}`" if found is None else f"a [kind of {found.name}](zoo.md#{found.name})"


def preset(field: dataclasses.Field[Any]) -> str:
    """The default; a section that may be left out shows its own fields instead."""
    value = default(field)
    nested = dataclasses.is_dataclass(field.default) or isinstance(field.default, Mapping)
    return "see below" if nested else value


if __name__ == "__main__":
    sys.exit(write_or_check("recipe", __doc__, TARGET, page()))
