"""How weights start: value = f(seed, full name, index), the same on every layout; a rank draws only what it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from shardforge.nn import counter
from shardforge.nn.module import Init, declared

CHUNK = 1 << 24
"""Elements drawn at a time: bounds the temporary int64 indices to 128 MiB."""


def constant(value: float) -> Init:
    return lambda key, index, dtype: torch.full(index.shape, value, dtype=dtype, device=index.device)


ones = constant(1.0)
zeros = constant(0.0)


def normal(std: float) -> Init:
    return lambda key, index, dtype: counter.normal(key, index, dtype).mul_(std)


def truncated_normal(std: float, bound: float = 2.0) -> Init:
    """Normal numbers, drawn again where they are beyond `bound` deviations; their own deviation is then below `std`."""
    below = math.erfc(bound / math.sqrt(2)) / 2

    def draw(key: int, index: Tensor, dtype: torch.dtype) -> Tensor:
        share = below + (1 - 2 * below) * counter.uniform(key, index, torch.float64)
        return torch.special.ndtri(share).mul_(std).to(dtype)

    return draw


def held(weight: Tensor) -> list[Tensor]:
    """For each dimension of a weight, the global indices that this rank holds (int64)."""
    if not isinstance(weight, DTensor):
        return [torch.arange(size, device=weight.device) for size in weight.shape]
    out = []
    for dim, size in enumerate(weight.shape):
        places = [_on_vector(place, dim) for place in weight.placements]
        whole = torch.arange(size, device=weight.device)
        out.append(distribute_tensor(whole, weight.device_mesh, places, src_data_rank=None)._local_tensor)
    return out


def _on_vector(place: Placement, dim: int) -> Placement:
    """What `place` does to dimension `dim`, as a placement of a vector as long as that dimension."""
    if getattr(place, "dim", None) != dim:
        return Replicate()
    if hasattr(place, "split_factor"):  # FSDP over a dimension that tp splits too
        return type(place)(0, split_factor=place.split_factor)
    return Shard(0)


def pieces(weight: Tensor, limit: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """What this rank holds of a weight, seen as a matrix of its first dimension by the others, some numbers at a time.

    Rows, columns, and the flat index [rows, columns] in the whole weight of at most `limit` numbers.
    """
    stride = [math.prod(weight.shape[dim + 1 :]) for dim in range(weight.dim())]
    high, *across = [index * step for index, step in zip(held(weight), stride, strict=True)]
    wide = torch.zeros(1, dtype=torch.int64, device=high.device)
    for column in across:
        wide = (wide[:, None] + column).flatten()
    step = max(1, limit // max(1, wide.numel()))
    for top in range(0, high.numel(), step):
        for left in range(0, wide.numel(), limit):
            rows, columns = slice(top, top + step), slice(left, left + limit)
            yield rows, columns, high[rows, None] + wide[columns]


def matrix(weight: Tensor) -> Tensor:
    """This rank's numbers of a weight, as `pieces` numbers them; shares its memory."""
    piece = weight._local_tensor if isinstance(weight, DTensor) else weight
    return piece.detach().view(piece.shape[0], math.prod(piece.shape[1:]))


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Initialise every declared weight in place, and forget what modules remember. Needs a real device."""
    for item in declared(model):
        key, numbers = counter.key(seed, item.fqn), matrix(item.weight)
        for rows, columns, index in pieces(item.weight, CHUNK):
            numbers[rows, columns] = item.init(key, index, numbers.dtype)
    for module in model.modules():
        for name in module.__dict__.get("remembered", ()):
            getattr(module, name).zero_()
