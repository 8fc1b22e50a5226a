"""Tensors of other programs as a source: found through a table of names, cut and turned as its forms say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.section import config
from shardforge.families.source import BARE, Beside, Info
from shardforge.families.statemap import Group, Read, StateMap
from shardforge.families.table import Row
from shardforge.model.build import build

SHOWN = 40


class Tensors(Protocol):
    """Whole tensors under the names that another program gave them."""

    @property
    def path(self) -> Path: ...

    @property
    def names(self) -> Mapping[str, Info]: ...

    def read(self, name: str) -> Tensor: ...


class LinkedSource:
    """See `families.source.Source`. `model` is the whole model section that `origin` describes.

    Problems lists every weight that is missing, has another shape than the model says, or has no place in it, except
    those whose names match one of `spare`.
    """

    moments: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def __init__(
        self,
        tensors: Tensors,
        model: dict[str, Any],
        table: Sequence[Row],
        *,
        origin: Path,
        spare: Sequence[str] = (),
        beside: Beside = BARE,
    ):
        self.path, self.tensors, self.beside = tensors.path, tensors, beside
        self.model = model
        built = build(config(model, origin), nn.Identity())
        wanted = {name: tuple(each["shape"]) for name, each in state.table(built).items()}
        self.map = StateMap(table, wanted)
        problems = [*self._unlike(wanted, origin), *self._left(spare)]
        if problems:
            raise Problems(_few(problems, origin), f"the weights in {self.path}")
        self.names = {name: Info(shape, self._dtype(name)) for name, shape in wanted.items()}

    def read(self, name: str) -> Tensor:
        return self._made(name, self.tensors.read)

    def _made(self, name: str, read: Read) -> Tensor:
        """A weight of ours, or what the optimizer keeps for it, of what `read` gives under their names."""
        group, part = self.map.place(name)
        theirs = [read(each) for each in group.theirs]
        mine = group.form.ours(theirs)[part]
        whole = sum(each.numel() for each in theirs)
        return mine.contiguous() if mine.numel() == whole else mine.clone(memory_format=torch.contiguous_format)

    def read_moment(self, kind: str, name: str) -> Tensor:
        raise CheckpointError(f"there is no {kind} of {name}: only weights are here", self.path, "drop the moments")

    def _dtype(self, name: str) -> str:
        return self.tensors.names[self.map.place(name)[0].theirs[0]].dtype

    def _unlike(self, wanted: Mapping[str, tuple[int, ...]], origin: Path) -> list[ForgeError]:
        """Weights of the model that are not there, or not of its shape."""
        problems: list[ForgeError] = [
            CheckpointError(f"{name} {list(wanted[name])} has no name in this family", self.path)
            for name in self.map.unnamed
        ]
        for group in self.map.groups:
            told = ", ".join(f"{name} {list(wanted[name])}" for name in group.ours)
            missing = [each for each in group.theirs if each not in self.tensors.names]
            if missing:
                problems.append(CheckpointError(f"{', '.join(missing[:3])} is missing, for {told}", self.path))
                continue
            here = self._shapes(group)
            for part, name in enumerate(group.ours):
                if here is None or here[part] != wanted[name]:
                    gives = "nothing that can be cut so" if here is None else str(list(here[part]))
                    theirs = ", ".join(group.theirs[:3])
                    what = f"{theirs} gives {name} {gives}, {origin.name} says {list(wanted[name])}"
                    problems.append(CheckpointError(what, self.path))
        return problems

    def _shapes(self, group: Group) -> list[tuple[int, ...]] | None:
        """Of our weights, from the shapes of theirs; None when they cannot be cut as the form says."""
        infos = [self.tensors.names[name] for name in group.theirs]
        theirs = [torch.empty(info.shape, dtype=TYPES[info.dtype][0], device="meta") for info in infos]
        try:
            made = [tuple(each.shape) for each in group.form.ours(theirs)]
        except (RuntimeError, IndexError, ValueError):
            return None
        return made if len(made) == len(group.ours) else None

    def _left(self, spare: Sequence[str]) -> list[ForgeError]:
        """Tensors that are there and no weight of the model."""
        used = {each for group in self.map.groups for each in group.theirs}
        idle = re.compile("|".join(f"(?:{each})" for each in spare) or r"(?!)")
        left = [name for name in self.tensors.names if name not in used and not idle.fullmatch(name)]
        return [
            CheckpointError(f"{name} {list(self.tensors.names[name].shape)} has no place in this model", self.path)
            for name in left
        ]


def _few(problems: list[ForgeError], origin: Path) -> list[ForgeError]:
    """The first of many, a wrong number of layers would give thousands; the last says what to do about all."""
    shown = (
        problems
        if len(problems) <= SHOWN
        else [*problems[:SHOWN], CheckpointError(f"and {len(problems) - SHOWN} more")]
    )
    fix = (
        f"see that {origin.name} is of this very model, or get the weights that are missing from where they were saved"
    )
    return [*shown[:-1], CheckpointError(shown[-1].what, shown[-1].where, fix)]
