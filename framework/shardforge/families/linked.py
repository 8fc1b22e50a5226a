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
from shardforge.families.source import Info
from shardforge.families.table import Place, Row, places
from shardforge.model.build import build
from shardforge.recipe.build import build as fill
from shardforge.recipe.model import ModelConfig
from shardforge.recipe.provenance import plain
from shardforge.recipe.tree import Origin, wrap

SHOWN = 40


class Tensors(Protocol):
    """Whole tensors under the names that another program gave them."""

    path: Path
    names: Mapping[str, Info]

    def read(self, name: str) -> Tensor: ...


class LinkedSource:
    """See `families.source.Source`. `model` is the model section that `origin` describes, in the least words.

    Problems lists every weight that is missing, has another shape than the model says, or has no place in it, except
    those whose names match one of `spare`.
    """

    moments: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()

    def __init__(
        self,
        tensors: Tensors,
        model: Mapping[str, Any],
        table: Sequence[Row],
        *,
        origin: Path,
        spare: Sequence[str] = (),
    ):
        self.path, self.tensors = tensors.path, tensors
        config, _ = fill(ModelConfig, wrap(model, Origin(str(origin))))
        self.model: dict[str, Any] = plain(config)
        wanted = {name: tuple(each["shape"]) for name, each in state.table(build(config, nn.Identity())).items()}
        found = dict(places(table, wanted))
        problems = [*self._unlike(wanted, found, origin), *self._left(found, spare)]
        if problems:
            raise Problems(_few(problems), f"the weights in {self.path}")
        self._places: dict[str, Place] = {name: place for name, place in found.items() if place is not None}
        self.names = {name: Info(wanted[name], self._dtype(place)) for name, place in self._places.items()}

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        theirs = [self.tensors.read(each) for each in place.theirs]
        mine = place.form.ours(theirs)[place.part]
        whole = sum(each.numel() for each in theirs)
        return mine.contiguous() if mine.numel() == whole else mine.clone(memory_format=torch.contiguous_format)

    def read_moment(self, kind: str, name: str) -> Tensor:
        raise CheckpointError(f"there is no {kind} of {name}: only weights are here", self.path, "drop the moments")

    def _dtype(self, place: Place) -> str:
        return self.tensors.names[place.theirs[0]].dtype

    def _unlike(
        self, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Place | None], origin: Path
    ) -> list[ForgeError]:
        """Weights of the model that are not there, or not of its shape."""
        problems: list[ForgeError] = []
        for name, shape in wanted.items():
            place = found[name]
            if place is None:
                problems.append(CheckpointError(f"{name} {list(shape)} has no name in this family", self.path))
            elif missing := [each for each in place.theirs if each not in self.tensors.names]:
                problems.append(
                    CheckpointError(f"{', '.join(missing)} is missing, for {name} {list(shape)}", self.path)
                )
            elif (here := self._shape(place)) != shape:
                what = f"{', '.join(place.theirs)} gives {name} {_shape(here)}, {origin.name} says {list(shape)}"
                problems.append(CheckpointError(what, self.path))
        return problems

    def _shape(self, place: Place) -> tuple[int, ...] | None:
        """Of our weight, from the shapes of theirs; None when they cannot be cut as the form says."""
        infos = [self.tensors.names[name] for name in place.theirs]
        theirs = [torch.empty(info.shape, dtype=TYPES[info.dtype][0], device="meta") for info in infos]
        try:
            return tuple(place.form.ours(theirs)[place.part].shape)
        except (RuntimeError, IndexError, ValueError):
            return None

    def _left(self, found: Mapping[str, Place | None], spare: Sequence[str]) -> list[ForgeError]:
        """Tensors that are there and no weight of the model."""
        used = {each for place in found.values() if place for each in place.theirs}
        idle = re.compile("|".join(f"(?:{each})" for each in spare) or r"(?!)")
        left = [name for name in self.tensors.names if name not in used and not idle.fullmatch(name)]
        return [
            CheckpointError(f"{name} {list(self.tensors.names[name].shape)} has no place in this model", self.path)
            for name in left
        ]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing that can be cut so" if shape is None else str(list(shape))


def _few(problems: list[ForgeError]) -> list[ForgeError]:
    """The first of many; a wrong number of layers would give thousands."""
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], CheckpointError(f"and {len(problems) - SHOWN} more")]
