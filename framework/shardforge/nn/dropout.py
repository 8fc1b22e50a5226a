"""Dropout as a function of (seed, step, layer, token, channel): any layout drops the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.nn import counter
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


class Dropout(Module):
    """Zeroes a share `rate` of [b, s, h] and scales the rest by 1 / (1 - rate); nothing when `seq.key` is None.

    `part` of `parts` says which slice of the tokens of `seq` x holds, when tp ranks share them between slots.
    """

    slot = "dropout"

    def __init__(self, rate: float, *site: object):
        super().__init__()
        self.rate = rate
        self.salt = torch.tensor(counter.key("dropout", *site), device="cpu")  # a number is a constant to a compiler
        self.part, self.parts = 0, 1

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        if self.rate == 0.0 or seq.key is None:
            return x
        width, local = x.shape[2], x.shape[1]
        first = self.part * local
        if seq.index is None:
            place = torch.arange(first, first + local, device=x.device)
        else:
            place = seq.index[first : first + local]
        token = seq.rows[:, None] * (seq.length or local * self.parts) + place
        index = token[:, :, None] * width + torch.arange(width, device=x.device)
        kept = counter.uniform(seq.key ^ self.salt, index) >= self.rate
        return x * kept / (1.0 - self.rate)
