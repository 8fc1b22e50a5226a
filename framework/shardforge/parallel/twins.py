"""Weights that two stages of a pipeline read: the second has a twin of the first one's, kept equal to it.

A module that reads or runs another module without owning it names its attribute in `borrowed`, as a tied head and
multi-token prediction do with the embedding. Where the two are on different stages, the borrower gets a copy of the
lender. The copy has no name in the model, so the optimizer, the norm and the checkpoint do not know it; to the passes
over a stage it is what its lender is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from shardforge.nn.module import Declared, declared


@dataclass(frozen=True)
class Loan:
    """A module of one stage and its twin in another; where a stage is not held, its module has no storage."""

    lender: nn.Module
    twin: nn.Module
    owner: int  # stage
    borrower: int  # stage


def part_with_twins(parts: Mapping[int, nn.Module]) -> list[Loan]:
    """Give each stage a twin of every module that it borrows from another. `parts` has all stages of the model."""
    home = {module: stage for stage, part in parts.items() for module in part.modules()}
    loans = []
    for stage, part in parts.items():
        twins: dict[nn.Module, nn.Module] = {}
        for module in list(part.modules()):
            for name in getattr(module, "borrowed", ()):
                lender = getattr(module, name)
                if home[lender] == stage:
                    continue
                if lender not in twins:
                    twins[lender] = copy.deepcopy(lender)
                    loans.append(Loan(lender, twins[lender], home[lender], stage))
                module.__dict__[name] = twins[lender]
        if twins:
            part.twins = nn.ModuleList(twins.values())
    return loans


class Twins:
    """The loans of one model, as one rank of a pipeline group serves them. Each call is collective over the group."""

    def __init__(self, loans: list[Loan], ranks: tuple[int, ...], group: ProcessGroup, device: torch.device):
        self.loans, self.ranks, self.group, self.device = loans, ranks, group, device

    @torch.no_grad()
    def settle(self) -> None:
        """Add the gradient of each twin to its owner's, and forget it."""
        for owner, twin, to, start in self._pairs():
            here = self.group.rank()
            grad = None
            if here == start:
                grad = torch.zeros_like(_piece(twin.weight)) if twin.weight.grad is None else _piece(twin.weight.grad)
                twin.weight.grad = None
            if here == to and start != to:
                grad = torch.empty_like(_piece(owner.weight))
            self._move(grad, start, to)
            if here == to:
                _piece(owner.weight.grad).add_(grad)

    @torch.no_grad()
    def renew(self) -> None:
        """Give each twin the weights of its owner."""
        for owner, twin, start, to in self._pairs():
            here = self.group.rank()
            if start == to == here:
                _piece(twin.weight).copy_(_piece(owner.weight))
            elif here in (start, to):
                self._move(_piece(owner.weight if here == start else twin.weight), start, to)

    def _pairs(self) -> Iterator[tuple[Declared, Declared, int, int]]:
        """(weight of an owner, weight of its twin, pipeline rank of the owner, that of the twin)."""
        for loan in self.loans:
            places = self.ranks[loan.owner], self.ranks[loan.borrower]
            for owner, twin in zip(declared(loan.lender), declared(loan.twin), strict=True):
                yield owner, twin, *places

    def _move(self, piece: Tensor | None, start: int, to: int) -> None:
        """Fill `piece` of rank `to` from that of rank `start`; both have the same shape, on the CPU or the device."""
        if piece is None or start == to or piece.numel() == 0:
            return
        moved = piece.detach().to(self.device).contiguous()
        if self.group.rank() == start:
            dist.send(moved, group=self.group, group_dst=to)
        elif self.group.rank() == to:
            dist.recv(moved, group=self.group, group_src=start)
            if moved.data_ptr() != piece.data_ptr():
                piece.copy_(moved)


def _piece(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()
