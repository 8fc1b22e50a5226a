"""Context parallelism: the positions of each sequence shared by the ranks of the cp axis."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(length: int, cp: int, rank: int) -> Tensor:
    """Places [length / cp] of the tokens that a cp rank holds: chunk `rank` and chunk `2 cp - 1 - rank` of 2 cp.

    Under a causal mask early chunks are cheap and late ones dear, so each rank has one of both.
    """
    if cp == 1:
        return torch.arange(length)
    chunks = torch.arange(length).view(2 * cp, -1)
    return torch.cat([chunks[rank], chunks[2 * cp - 1 - rank]])
