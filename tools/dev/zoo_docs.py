"""Write docs/reference/zoo.md: every kind, what its file says about it, and its fields. `--check` only compares."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardforge.cli.zoo import Entry, entries, every_slot
from shardforge.core.slots import Slot

TARGET = Path(__file__).resolve().parents[2] / "docs" / "reference" / "zoo.md"
HEAD = """# Zoo

Every kind that a recipe may name, by slot. Written by `python tools/dev/zoo_docs.py` from the files of the kinds;
`shardforge zoo` prints the same in a terminal.
"""
LIMITS = {"at_least": "at least", "at_most": "at most", "above": "above"}


def page() -> str:
    """The whole document."""
    lines = [HEAD]
    for slot in every_slot():
        lines += [f"## {slot.name}", ""]
        for entry in entries(slot):
            lines += [*kind_lines(entry, slot), ""]
    return "\n".join(lines).rstrip() + "\n"


def kind_lines(entry: Entry, slot: Slot) -> Iterator[str]:
    yield f"### {entry.kind}"
    yield ""
    yield entry.summary
    if entry.fields:
        yield ""
    for name, text in entry.fields.items():
        yield f"- **{name}:** {plain(text)}"
    fields = [field for field in dataclasses.fields(slot.kinds()[entry.kind]) if field.init]
    if fields:
        yield ""
        yield "| field | type | default | meaning |"
        yield "|---|---|---|---|"
    for field in fields:
        cells = (f"`{field.name}`", f"`{field.type}`", default(field), meaning(field.metadata))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def plain(text: str) -> str:
    """Text of a docstring in which markdown sees no emphasis; what stands in backticks stays as it is."""
    parts = text.split("`")
    return "`".join(part if index % 2 else part.replace("*", r"\*") for index, part in enumerate(parts))


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "empty" if field.default is None else f"`{field.default}`"
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    return "required"


def meaning(metadata: Any) -> str:
    """Meaning, unit and limits of a field, as its `option` gives them."""
    text = plain(metadata.get("meaning", ""))
    notes = [metadata["unit"]] if metadata.get("unit") else []
    notes += [f"{words} {metadata[key]:g}" for key, words in LIMITS.items() if key in metadata]
    return f"{text} ({', '.join(notes)})" if notes else text


def write_or_check(name: str, description: str, target: Path, page: str) -> int:
    """The command line of a generated page; exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is not current")
    if parser.parse_args().check:
        current = target.exists() and target.read_text() == page
        print(f"{name}: current" if current else f"{name}: {target.name} is old; run python tools/dev/{name}_docs.py")
        return 0 if current else 1
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page)
    print(f"{name}: wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(write_or_check("zoo", __doc__, TARGET, page()))
