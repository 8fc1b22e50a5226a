"""What every router has in common: one affinity for each token and expert, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Linear
from shardforge.nn.module import local
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit


@dataclass(frozen=True)
class Routing:
    """Of one micro-batch; `expert` carries no gradient."""

    expert: Tensor  # [b, s, k] int64, the experts of each token, or NOWHERE
    weight: Tensor  # [b, s, k] factors on what they return
    shares: Tensor  # [b, s, e] affinities as shares of 1, for the balance loss
    logits: Tensor  # [b, s, e] of x alone, without any bias, for the z-loss
    counted: Tensor | None = None  # [b, s, k] what the balance loss over sequences counts, where it is not `expert`


class Router(Protocol):
    """What an ffn asks: a module whose call is collective over the ranks that share sequences (`split`)."""

    def __call__(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:
        """x [b, s/parts, h]: this rank's tokens of those that `seq` describes."""
        ...


class Logits(Linear):
    """x W^T in float32 at least, also where x and W are narrower. Its dimension has no rule: whole on every rank."""

    def __init__(self, experts: int, ctx: BuildContext):
        super().__init__(ctx.hidden, Dim("router", experts), ctx.into(ctx.hidden))

    def logits(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, e]
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), local(self.weight).to(wide))
