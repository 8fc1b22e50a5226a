"""Dropout as a function of (seed, step, layer, token, channel): any layout drops the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.nn import counter
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


class Dropout(Module):
    """Zeroes a share `rate` of [b, s, h] and scales the rest by 1 / (1 - rate); nothing when `seq.key` is None.

    `part` of `parts` says which slice of the sequence x holds when positions are split over ranks.
    """

    slot = "dropout"

    def __init__(self, rate: float, *site: object):
        super().__init__()
        self.rate, self.salt = rate, counter.key("dropout", *site)
        self.part, self.parts = 0, 1

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        if self.rate == 0.0 or seq.key is None:
            return x
        width, local = x.shape[2], x.shape[1]
        token = seq.rows[:, None] * (local * self.parts) + torch.arange(local, device=x.device) + self.part * local
        index = token[:, :, None] * width + torch.arange(width, device=x.device)
        kept = counter.uniform(seq.key ^ self.salt, index) >= self.rate
        return x * kept / (1.0 - self.rate)
