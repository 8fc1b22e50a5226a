"""How alike the experts of each layer are: the mean cosine between the weights of two of them.

Of unit vectors u_i of E experts, the mean over i != j of u_i . u_j is (|sum_i u_i|^2 - E) / (E (E - 1)): two sums over
all ranks, one number an expert and SAMPLE numbers a layer, whatever the size of the experts. 1 where all are copies, as
after an upcycling that changes nothing; about 0 where they are drawn apart. Lo et al. 2024, "A Closer Look into
Mixture-of-Experts in Large Language Models", arXiv:2406.18219, compares experts so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardforge.engine.notes import Key
from shardforge.nn.init import held
from shardforge.nn.module import Declared, declared

SAMPLE = 1024
"""Coordinates of an expert that are compared: the deviation of a cosine of unlike experts is about 1/sqrt of it."""

GOLDEN = (math.sqrt(5) - 1) / 2
"""Multiples of it, modulo 1, are spread evenly, and not along the rows or columns of a matrix."""


@dataclass(frozen=True)
class Piece:
    """What a rank holds of the sampled coordinates of one matrix of a layer's experts."""

    layer: int
    rows: Tensor  # [e here] experts
    columns: Tensor  # [c] places in the sample
    values: Tensor  # [e here, c], float64
    share: float  # 1 / ranks that hold the same


@torch.no_grad()
def measured(
    model: nn.Module, tallies: Mapping[Key, int], ranks: int,
    summed: Callable[[list[Tensor], torch.device], list[Tensor]], device: torch.device,
) -> dict[int, float]:  # fmt: skip
    """Mean cosine by layer, of layers with two experts or more; the same on every layout and every rank. Collective.

    `tallies` are those of `Notes`, `ranks` those of a pipeline's stage; `summed` adds vectors over all ranks and
    leaves them on `device`. Weights must be at rest. An expert without any weight but 0 is like no other.
    """
    experts = {layer: length for (layer, name), length in tallies.items() if name == "load" and length > 1}
    if not experts:
        return {}
    squares = {layer: torch.zeros(e, dtype=torch.float64, device=device) for layer, e in experts.items()}
    for piece in pieces(model, experts, ranks, device):
        squares[piece.layer].index_add_(0, piece.rows, piece.values.square().sum(1) * piece.share)
    squares = dict(zip(experts, summed(list(squares.values()), device), strict=True))
    sums = {layer: torch.zeros(SAMPLE, dtype=torch.float64, device=device) for layer in experts}
    for piece in pieces(model, experts, ranks, device):
        norms = squares[piece.layer][piece.rows].sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        sums[piece.layer].index_add_(0, piece.columns, (piece.values / norms[:, None]).sum(0) * piece.share)
    sums = dict(zip(experts, summed(list(sums.values()), device), strict=True))
    found = [(sums[layer].square().sum() - (squares[layer] > 0).sum()) / (e * (e - 1)) for layer, e in experts.items()]
    return dict(zip(experts, torch.stack(found).tolist(), strict=True))


def pieces(model: nn.Module, experts: Mapping[int, int], ranks: int, device: torch.device) -> Iterator[Piece]:
    """All pieces on this rank, brought to `device`."""
    for module in model.modules():
        if "load" not in getattr(module, "tallies", {}) or module.layer not in experts:
            continue
        found = matrices(module)
        sample = spread(sum(math.prod(item.weight.shape[1:]) for item in found))
        for item in found:
            width = math.prod(item.weight.shape[1:])
            columns = torch.nonzero((sample >= 0) & (sample < width))[:, 0]
            rows, here, values = part(item.weight, sample[columns])
            where = rows.to(device), columns[here.cpu()].to(device)
            yield Piece(module.layer, *where, values.double().to(device), 1 / copies(item.weight, ranks))
            sample = sample - width


def matrices(module: nn.Module) -> list[Declared]:
    """The weights over experts [e, ..., ...], in order."""
    return [item for item in declared(module) if item.dims[0].name == "expert" and len(item.dims) > 2]


def spread(count: int) -> Tensor:
    """At most SAMPLE of `count` places, ascending int64."""
    if count <= SAMPLE:
        return torch.arange(count)
    return (torch.arange(SAMPLE, dtype=torch.float64).mul(GOLDEN).frac() * count).long().unique()


def part(weight: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Experts that this rank holds, which of `places` (flat in an expert's matrix) it holds of them, and the values."""
    piece = weight._local_tensor if isinstance(weight, DTensor) else weight
    rows, *across = [index.to(piece.device) for index in held(weight)]
    rest = places.to(piece.device)
    here, inside = torch.ones_like(rest, dtype=torch.bool), []
    for size, mine in zip(reversed(weight.shape[1:]), reversed(across), strict=True):
        own = torch.full((size,), -1, device=piece.device)
        own[mine] = torch.arange(len(mine), device=piece.device)
        inside.insert(0, own[rest % size])
        here, rest = here & (inside[0] >= 0), rest // size
    return rows, here, piece.detach()[:, *(index[here] for index in inside)]


def copies(weight: Tensor, ranks: int) -> int:
    """How many of a stage's ranks hold the same numbers of a weight."""
    if not isinstance(weight, DTensor):
        return ranks
    return ranks // math.prod(
        weight.device_mesh.size(axis) for axis, place in enumerate(weight.placements) if not place.is_replicate()
    )
