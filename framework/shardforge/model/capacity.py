"""Which assignments of tokens to experts an expert with limited room keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.nn.dispatch import count


def kept(expert: Tensor, documents: Tensor, experts: int, capacity: float) -> Tensor:
    """expert [b, s, k], documents [b, s], whole sequences in order -> bool [b, s, k].

    In a document of n tokens each expert keeps the first ceil(capacity * n * k / experts) tokens that chose it.
    """
    b, s, k = expert.shape  # documents get numbers of their own, [b, s], over all rows
    starts = torch.ones_like(documents)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    piece = starts.cumsum(1) - 1 + s * torch.arange(b, device=documents.device)[:, None]  # [b, s]
    length = count(piece.flatten(), b * s)
    room = (length.double() * (capacity * k / experts)).ceil().long()
    queue = (piece[:, :, None] * experts + expert).flatten()
    order = queue.argsort(stable=True)
    ahead = torch.empty_like(queue)
    ahead[order] = torch.arange(queue.numel(), device=queue.device) - torch.searchsorted(queue[order], queue[order])
    return ahead.view(b, s, k) < room[piece][:, :, None]
