"""Module base: weights declared by what their dimensions mean, and local(), the one way to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from shardforge.core.dims import Dim

Init = Callable[[int, Tensor, torch.dtype], Tensor]
"""(key, flat index of each element in the whole weight, dtype) -> values."""


class Module(nn.Module):
    """A module whose weights are declared.

    `boundary` is what the tensor pass does around it when it fills a slot: "gather" hands it the whole sequence and
    takes a partial sum, "local" leaves it its own positions. A module whose input is read by some of its Linears and
    by nothing else names them in `enters`, and the one whose result is its own result in `leaves`: these matmuls can
    run beside the collectives.
    """

    boundary: ClassVar[Literal["gather", "local"]] = "gather"
    enters: tuple[str, ...] = ()
    leaves: str | None = None
    records: tuple[str, ...] = ()  # names of the 0-d sums that it notes, see Sequence.record
    tallies: Mapping[str, int] = {}  # name -> length of the vectors that it notes for its layer alone
    slot: str = ""  # the tag by which passes find it: "block", "mixer", "ffn", ...

    def declare(self, name: str, *dims: Dim, init: Init) -> None:
        """Register a weight of shape [d.size for d in dims] (uninitialised until `nn.init.fill`)."""
        self.register_parameter(name, nn.Parameter(torch.empty([dim.size for dim in dims])))
        self.__dict__.setdefault("declared", {})[name] = (dims, init)

    def remember(self, name: str, *dims: Dim) -> None:
        """Register numbers that are no weights: float32 whatever the model's type is, zero at the start, saved with
        the model, the same on every rank that has the module."""
        self.register_buffer(name, torch.empty([dim.size for dim in dims], dtype=torch.float32))
        self.__dict__.setdefault("remembered", []).append(name)


@dataclass(frozen=True)
class Declared:
    """One weight of a model: where it is and what its dimensions mean."""

    fqn: str
    module: nn.Module
    name: str
    dims: tuple[Dim, ...]
    init: Init

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.module, self.name)

    @property
    def count(self) -> int:
        """Numbers in the whole weight, over all ranks."""
        total = 1
        for dim in self.dims:
            total *= dim.size
        return total


def declared(model: nn.Module) -> Iterator[Declared]:
    """Every declared weight of a model, in the order of construction."""
    for prefix, module in model.named_modules():
        for name, (dims, init) in module.__dict__.get("declared", {}).items():
            yield Declared(f"{prefix}.{name}" if prefix else name, module, name, dims, init)


def tagged(model: nn.Module, slot: str) -> Iterator[Module]:
    """Modules of a model that fill the named slot, in the order of construction."""
    for module in model.modules():
        if isinstance(module, Module) and module.slot == slot:
            yield module


def local(weight: Tensor, rows: slice | None = None) -> Tensor:
    """This rank's piece of a weight, for compute; `rows` of it where the rank holds more than it works with.

    Every rank of a tp group works on different positions or different heads, so the gradient of a weight that is
    whole on each rank is only a part of the sum.
    """
    if isinstance(weight, DTensor):
        grads = tuple(Partial() if place.is_replicate() else place for place in weight.placements)
        weight = weight.to_local(grad_placements=grads)
    return weight if rows is None else weight[rows]
