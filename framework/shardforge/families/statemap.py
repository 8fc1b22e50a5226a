"""Which tensors of another program hold which weights of one model of ours: a bijection, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from shardforge.families.forms import Form
from shardforge.families.table import Row, pattern

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Group:
    """Weights of ours and tensors of theirs that are made of one another, and of nothing else."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form


class StateMap:
    """The `table` of a family, applied to a model whose weights have these names and whole shapes.

    `groups` are in the order of the model; `unnamed` are the weights that no row names, or that a row names beside
    others which the model lacks.
    """

    def __init__(self, table: Sequence[Row], weights: Mapping[str, tuple[int, ...]]):
        patterns = [(pattern(text), row) for row in table for text in row.ours]
        self.groups: list[Group] = []
        self.unnamed: list[str] = []
        self._of: dict[str, Group] = {}
        for name in weights:
            if name in self._of:
                continue
            hits = ((known.fullmatch(name), row) for known, row in patterns)
            group = next((_group(row, hit.groupdict(), weights) for hit, row in hits if hit), None)
            if group is None or any(each not in weights for each in group.ours):
                self.unnamed.append(name)
                continue
            self.groups.append(group)
            self._of |= dict.fromkeys(group.ours, group)

    def place(self, name: str) -> tuple[Group, int]:
        """The group of a weight of ours, and its number therein. KeyError for one that is unnamed."""
        group = self._of[name]
        return group, group.ours.index(name)

    def to(self, ours: Read) -> Iterator[tuple[str, Tensor]]:
        """Their tensors by name, made of ours one group after another."""
        for group in self.groups:
            made = group.form.theirs([ours(name) for name in group.ours])
            yield from zip(group.theirs, made, strict=True)

    def back(self, theirs: Read) -> Iterator[tuple[str, Tensor]]:
        """Our weights by name, made of theirs one group after another."""
        for group in self.groups:
            made = group.form.ours([theirs(name) for name in group.theirs])
            yield from zip(group.ours, made, strict=True)


def _group(row: Row, marks: Mapping[str, str], weights: Mapping[str, tuple[int, ...]]) -> Group:
    ours = tuple(text.format(**marks) for text in row.ours)
    if not row.each:
        return Group(ours, tuple(text.format(**marks) for text in row.theirs), row.form)
    count = weights[ours[0]][0] if ours[0] in weights else 0
    numbered = (text.format(**marks, **{row.each: at}) for at in range(count) for text in row.theirs)
    return Group(ours, tuple(numbered), row.form)
