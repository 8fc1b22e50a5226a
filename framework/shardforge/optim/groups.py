"""Which weights decay: decided by what their dimensions mean, never by their names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from shardforge.core.dims import role
from shardforge.nn.module import declared


def groups(model: nn.Module, weight_decay: float, decayed: Collection[str]) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer: decaying weights first, the others second; empty groups left out."""
    by_decay: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for item in declared(model):
        by_decay[role(item.dims) in decayed].append(item.weight)
    out = [
        {"params": by_decay[True], "weight_decay": weight_decay},
        {"params": by_decay[False], "weight_decay": 0.0},
    ]
    return [group for group in out if group["params"]]
