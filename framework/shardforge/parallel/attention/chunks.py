"""The zigzag order: a sequence cut in 2 cp chunks, of which rank r holds number r and number 2 cp - 1 - r.

Under a causal mask early chunks are cheap and late ones dear; each rank has one of both, and the same work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def held(cp: int, rank: int) -> tuple[int, int]:
    """Numbers of the two chunks of a rank, in the order in which it holds them."""
    return rank, 2 * cp - 1 - rank


def own(x: Tensor, cp: int, rank: int, dim: int) -> Tensor:
    """The part of a whole sequence that a rank holds, out of x in natural order."""
    chunks = x.chunk(2 * cp, dim)
    return torch.cat([chunks[number] for number in held(cp, rank)], dim)


def sorted_chunks(x: Tensor, cp: int, dim: int) -> list[Tensor]:
    """Views of the 2 cp chunks in natural order, out of what the ranks hold, joined by rank along `dim`."""
    chunks = x.chunk(2 * cp, dim)
    return [chunks[2 * number] for number in range(cp)] + [chunks[2 * number + 1] for number in reversed(range(cp))]


def natural(x: Tensor, cp: int, dim: int) -> Tensor:
    """The whole sequence in natural order, out of what the ranks hold, joined by rank along `dim`."""
    return torch.cat(sorted_chunks(x, cp, dim), dim)


def by_rank(x: Tensor, cp: int, dim: int) -> Tensor:
    """The inverse of `natural`: what the ranks hold, joined by rank."""
    return torch.cat([own(x, cp, rank, dim) for rank in range(cp)], dim)
