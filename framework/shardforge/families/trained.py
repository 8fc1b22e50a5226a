"""The names of a family while transformers trains a model of it, where they are not those of its published files.

Reference: transformers 5, which holds the experts of a layer stacked, gate above up, and calls every mixture `mlp`.
Limits: transformers 4 trains under the names of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardforge.families.forms import TURNED, Chain, Rows
from shardforge.families.table import Row

MIXTURES = {".block_sparse_moe": ".mlp"}
GATE_UP = Chain((Rows(2, dim=1), TURNED))
"""Experts' matrices [e, 2 f, h] that are two of ours, [e, h, f] each."""


def trained(table: Sequence[Row]) -> tuple[Row, ...]:
    """The table of a family for the weights of its module; the same for a family without experts one by one."""
    found: list[Row] = []
    experts: dict[str, dict[str, str]] = {}
    for row in table:
        if row.each:
            block, role = row.theirs[0].partition(f".{{{row.each}}}.")[0], row.ours[0].rpartition(".")[2]
            experts.setdefault(_called(block), {})[role] = row.ours[0]
        else:
            found.append(replace(row, theirs=tuple(_called(name) for name in row.theirs)))
    for block, ours in experts.items():
        found.append(Row((ours["gate"], ours["up"]), (f"{block}.gate_up_proj",), GATE_UP))
        found.append(Row((ours["down"],), (f"{block}.down_proj",), TURNED))
    return tuple(found)


def _called(name: str) -> str:
    for published, module in MIXTURES.items():
        name = name.replace(published, module)
    return name
