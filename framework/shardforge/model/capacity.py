"""Experts with limited room: which assignments of tokens each of them keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardforge.core.options import REQUIRED, option
from shardforge.nn.dispatch import NOWHERE, count

STEP = 2.0**-16
"""Weights that are the same in these steps are equal: what a layout rounds otherwise must not decide who is dropped
where tokens repeat."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    factor: float = option(REQUIRED, "room of an expert, in multiples of an even share; Switch takes 1.25", above=0)
    eval_factor: float | None = option(None, "the same in evaluation; empty means factor; Switch takes 2.0", above=0)
    min: int = option(4, "of a document, for which every expert has room", unit="tokens", at_least=0)
    drop: Literal["position", "weight"] = option(
        "position",
        "what an expert without room loses: position its last tokens; weight those with the smallest router weight, so "
        "that later tokens can push out earlier ones of their document, which then know something of them",
    )
    rounding: Literal["floor", "ceil"] = option("floor", "of factor * k * n / experts; Megatron takes ceil")

    def room(self, length: Tensor, experts: int, k: int, *, training: bool) -> Tensor:
        """Tokens that an expert keeps of documents of `length` tokens, int64."""
        factor = self.factor if training or self.eval_factor is None else self.eval_factor
        share = (length * k).double() * factor / experts
        return (share.floor() if self.rounding == "floor" else share.ceil()).long().clamp(min=self.min)

    def kept(self, expert: Tensor, weight: Tensor, documents: Tensor, experts: int, *, training: bool) -> Tensor:
        """expert and weight [b, s, k], documents [b, s], whole sequences in order -> bool [b, s, k].

        In each document each expert keeps as many of the tokens that chose it as it has room for: the first ones, or
        those with the largest weights, of equal ones the first. NOWHERE is not kept and takes no room.
        """
        b, s, k = expert.shape  # documents get numbers of their own, [b, s], over all rows
        starts = torch.ones_like(documents)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        piece = starts.cumsum(1) - 1 + s * torch.arange(b, device=documents.device)[:, None]  # [b, s]
        room = self.room(count(piece.flatten(), b * s), experts, k, training=training)
        queue = (piece[:, :, None] * (experts + 1) + expert + 1).flatten()
        if self.drop == "weight":
            first = (weight / STEP).round().long().flatten().argsort(descending=True, stable=True)
            order = first[queue[first].argsort(stable=True)]
        else:
            order = queue.argsort(stable=True)
        ahead, lined = torch.empty_like(queue), queue[order]
        ahead[order] = torch.arange(queue.numel(), device=queue.device) - torch.searchsorted(lined, lined)
        return (ahead.view(b, s, k) < room[piece][:, :, None]) & (expert != NOWHERE)
