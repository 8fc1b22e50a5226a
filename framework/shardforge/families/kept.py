"""What an optimizer kept, sorted: what weights have in their own shape, what is one number, what cannot be carried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardforge.core.errors import CheckpointError, ForgeError, Problems

Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 8
DROP = "copy the checkpoint again, or leave the moments: --moments drop"


@dataclass(frozen=True)
class Kept:
    """Kinds, like "exp_avg"; `torn` is what keeps those of `moments` and `counts` from being carried."""

    moments: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    torn: tuple[ForgeError, ...] = ()
    unread: tuple[str, ...] = ()  # kinds that are of neither sort, a line each

    def check(self, path: Path) -> None:
        """Problems where something of what the optimizer kept is missing: it cannot go on with the rest."""
        if self.torn:
            more = [CheckpointError(f"and {len(self.torn) - SHOWN} more")] if len(self.torn) > SHOWN else []
            raise Problems([*self.torn[:SHOWN], *more], f"what the optimizer kept in {path}")


def kept(weights: Shapes, kinds: Mapping[str, Shapes]) -> Kept:
    """Sort the kinds, each a mapping of weights to the shapes of what is kept for them.

    A weight that has none of any kind is one that the optimizer does not update; one that has some must have all.
    """
    counts = [kind for kind, found in kinds.items() if set(found.values()) == {()}]
    sized = [kind for kind in kinds if kind not in counts]
    moments = [kind for kind in sized if any(weights.get(name) == shape for name, shape in kinds[kind].items())]
    carried = sorted([*moments, *counts])
    updated = sorted({name for kind in carried for name in kinds[kind]})
    torn: list[ForgeError] = []
    for kind in carried:
        for name in updated:
            if told := _wrong(weights.get(name), kinds[kind].get(name), alone=kind in counts):
                torn.append(CheckpointError(f"{kind} of {name} {told}", fix=DROP))
    odd = sorted(set(sized) - set(moments))
    unread = tuple(f"{kind}, which the optimizer kept: it has the shape of no weight" for kind in odd)
    return Kept(tuple(sorted(moments)), tuple(sorted(counts)), tuple(torn), unread)


def _wrong(weight: tuple[int, ...] | None, found: tuple[int, ...] | None, *, alone: bool) -> str:
    """What is wrong with what is kept for a weight; "" for nothing."""
    if found is None:
        return "is missing"
    if weight is None:
        return "is of no weight here"
    if not alone and found != weight:
        return f"is {list(found)}, the weight {list(weight)}"
    return ""
