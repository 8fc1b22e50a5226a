"""Ways in which other programs lay our weights out: fused into one tensor, transposed, stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Form(Protocol):
    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Our weights from theirs; on meta tensors it tells their shapes."""
        ...


@dataclass(frozen=True)
class Same:
    """One weight each, as it is."""

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return theirs


@dataclass(frozen=True)
class Columns:
    """Matrices stored as [in, out], `parts` of ours side by side along the outputs; vectors end to end."""

    parts: int = 1

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs
        return (whole.T if whole.dim() == 2 else whole).chunk(self.parts, 0)


@dataclass(frozen=True)
class Rows:
    """`parts` of ours, equally large, one below the other."""

    parts: int

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs
        return whole.chunk(self.parts, 0)


@dataclass(frozen=True)
class QueryGroups:
    """Rows of q, k and v by group: the query heads that read one key head, that key head, its value head."""

    groups: int  # key/value heads
    width: int  # of a head

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs  # [m * (n / m + 2) * d, ...]
        heads = whole.unflatten(0, (self.groups, -1, self.width))
        return [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]


SAME = Same()
