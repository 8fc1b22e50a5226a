"""Ways in which other programs lay our weights out: fused into one tensor, transposed, stacked, padded. Both ways.

Each form is a bijection: `theirs(ours(t))` is t, and `ours(theirs(w))` is w, bit for bit. Tensors come back as views
where that is possible; none is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError


class Form(Protocol):
    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Our weights from theirs; on meta tensors it tells their shapes. Errors of torch where they cannot be cut."""
        ...

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        """The other way."""
        ...


@dataclass(frozen=True)
class Same:
    """One weight each, as it is."""

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return theirs

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return ours


@dataclass(frozen=True)
class Turned:
    """One matrix each, or a stack of them, stored with inputs and outputs exchanged; vectors as they are."""

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [each.mT if each.dim() > 1 else each for each in theirs]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.ours(ours)


@dataclass(frozen=True)
class Rows:
    """`parts` of ours, equally large, one below the other; side by side along dimension `dim`."""

    parts: int
    dim: int = 0

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs
        return whole.unflatten(self.dim, (self.parts, -1)).unbind(self.dim)

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        assert len(ours) == self.parts, f"{len(ours)} of {self.parts} parts"
        return [torch.cat(list(ours), self.dim)]


@dataclass(frozen=True)
class Alternating:
    """`parts` of ours, equally large, whose numbers take turns along the last dimension."""

    parts: int = 2

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs
        return whole.unflatten(-1, (-1, self.parts)).unbind(-1)

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.stack(list(ours), -1).flatten(-2)]


@dataclass(frozen=True)
class QueryGroups:
    """Rows of q, k and v by group: the query heads that read one key head, that key head, its value head."""

    groups: int  # key/value heads
    width: int  # of a head

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = theirs  # [m * (n / m + 2) * d, ...]
        heads = whole.unflatten(0, (self.groups, -1, self.width))
        return [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        heads = [part.unflatten(0, (self.groups, -1, self.width)) for part in ours]
        return [torch.cat(heads, 1).flatten(0, 2)]


@dataclass(frozen=True)
class Stacked:
    """Tensors of theirs on top of one another in one of ours: experts that lie in the file one by one."""

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [torch.stack(list(theirs))]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = ours
        return whole.unbind(0)


@dataclass(frozen=True)
class Paired:
    """Rows of rotary channels: ours turn (i, i + width / 2), theirs (2 i, 2 i + 1).

    `heads` heads, of whose channels the first `start` and those beyond `start + width` are not turned.
    """

    heads: int
    width: int
    start: int = 0

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._each(each, (-1, 2)) for each in theirs]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._each(each, (2, -1)) for each in ours]

    def _each(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        heads = rows.unflatten(0, (self.heads, -1))
        end = self.start + self.width
        turned = heads[:, self.start : end].unflatten(1, shape).transpose(1, 2).flatten(1, 2)
        return torch.cat([heads[:, : self.start], turned, heads[:, end:]], 1).flatten(0, 1)


@dataclass(frozen=True)
class Padded:
    """A table of `rows` rows of ours, followed by zeros up to `whole` rows in theirs; the rows of padding are lost."""

    rows: int
    whole: int

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        (table,) = theirs
        return [table[: self.rows]]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        (table,) = ours
        return [torch.cat([table, table.new_zeros(self.whole - self.rows, *table.shape[1:])])]


@dataclass(frozen=True)
class Copies:
    """One weight of ours that the file holds under several `names`. CheckpointError where they are not the same."""

    names: tuple[str, ...]

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        first = theirs[0]
        for name, other in zip(self.names[1:], theirs[1:], strict=True):
            if other.shape != first.shape or other.dtype != first.dtype:
                raise ValueError(f"{name} has another shape or type than {self.names[0]}")
            if not first.is_meta and not torch.equal(_bits(other), _bits(first)):
                raise CheckpointError(f"{name} should be a copy of {self.names[0]}, and holds other numbers")
        return [first]

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = ours
        return [whole] * len(self.names)


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes, of which those of a NaN equal themselves."""
    return tensor.contiguous().view(torch.uint8)


@dataclass(frozen=True)
class Chain:
    """One form behind the other: from theirs to ours in this order."""

    forms: tuple[Form, ...]

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        for form in self.forms:
            theirs = form.ours(theirs)
        return theirs

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        for form in reversed(self.forms):
            ours = form.theirs(ours)
        return ours


@dataclass(frozen=True)
class Reversed:
    """A form read from the other side: its theirs are ours."""

    form: Form

    def ours(self, theirs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.form.theirs(theirs)

    def theirs(self, ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.form.ours(ours)


SAME = Same()
TURNED = Turned()
SIDE_BY_SIDE = Chain((TURNED, Rows(3)))
"""A matrix [in, 3 * out] or a vector [3 * out] that is three of ours."""
EXPERTS = Chain((TURNED, Stacked()))
"""Experts' matrices [out, in] one by one, ours [e, in, out]."""
