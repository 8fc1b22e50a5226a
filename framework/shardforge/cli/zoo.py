"""`shardforge zoo`: every kind a recipe may name, with its paper, what it changes and what it costs."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from shardforge.core import slots
from shardforge.core.errors import ForgeError, suggest

HELP = "every kind a recipe may name: its paper, what it changes, what it costs"
FIELDS = ("Paper", "Changes", "Cost", "Limits")


@dataclass(frozen=True)
class Entry:
    """One kind as its file's docstring describes it."""

    slot: str
    kind: str
    summary: str
    fields: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slot", nargs="?", help="only this slot, for example mixer")


def run(args: argparse.Namespace) -> int:
    known = {slot.name: slot for slot in every_slot()}
    if args.slot is not None and args.slot not in known:
        raise ForgeError(f"no slot is called {args.slot!r}", "shardforge zoo", suggest(args.slot, known))
    for name, slot in known.items():
        if args.slot in (None, name):
            print("\n".join(lines(entries(slot))))
    return 0


def every_slot() -> list[slots.Slot]:
    """All slots, in the order of core/slots.py."""
    return [value for value in vars(slots).values() if isinstance(value, slots.Slot)]


def entries(slot: slots.Slot) -> list[Entry]:
    """The kinds of one slot, sorted by name; imports their files, and torch with them."""
    found = []
    for kind, config in slot.kinds().items():
        summary, fields = read_header(sys.modules[config.__module__].__doc__ or "")
        found.append(Entry(slot.name, kind, summary, fields))
    return found


def read_header(docstring: str) -> tuple[str, dict[str, str]]:
    """First line of a kind's docstring, and its `Paper:`, `Changes:`, `Cost:`, `Limits:` with line breaks undone."""
    first, _, rest = docstring.strip().partition("\n")
    fields: dict[str, str] = {}
    current = ""
    for line in rest.splitlines():
        head, colon, text = line.partition(":")
        if colon and head in FIELDS:
            current = head
            fields[current] = text.strip()
        elif not line.strip():
            current = ""
        elif current:
            fields[current] = f"{fields[current]} {line.strip()}".strip()
    return first, fields


def lines(found: list[Entry]) -> list[str]:
    """The terminal's form: one line a kind, its fields indented below."""
    printed = []
    for entry in found:
        printed.append(f"{entry.slot + ': ' + entry.kind:<28}{entry.summary}")
        printed += [f"    {name + ':':<9}{text}" for name, text in entry.fields.items()]
    return [*printed, ""] if printed else []
