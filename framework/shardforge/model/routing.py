"""What every router has in common: one affinity for each token and expert, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.model.groups import highest
from shardforge.nn import counter
from shardforge.nn.linear import Linear
from shardforge.nn.module import Init, local
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit

TINY = 1e-20
"""Added to a sum of affinities before it divides, as in DeepSeek-V3's released code."""


@dataclass(frozen=True)
class Routing:
    """Of one micro-batch; `expert` carries no gradient."""

    expert: Tensor  # [b, s, k] int64, the experts of each token, or NOWHERE
    weight: Tensor  # [b, s, k] factors on what they return
    shares: Tensor  # [b, s, e] affinities as shares of 1, for the balance loss
    logits: Tensor  # [b, s, e] of x alone, without any bias, for the z-loss
    unbiased: Tensor | None = None  # [b, s, e] what would choose `expert` without a bias on the choice and groups

    @property
    def counted(self) -> Tensor:
        """[b, s, k] what the balance loss over sequences counts (DeepSeek-V3, eq. 18), found where it is asked for."""
        return self.expert if self.unbiased is None else highest(self.unbiased, self.expert.shape[-1])


class Router(Protocol):
    """What an ffn asks: a module whose call is collective over the ranks that share sequences (`split`).

    Its config has `build(ctx, experts, k)`, and `check(experts, k)` that raises what is wrong with the three together.
    """

    k: float  # experts that a token goes through, on average
    dropless: bool  # every slot names an expert, never NOWHERE

    def __call__(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:
        """x [b, s/parts, h]: this rank's tokens of those that `seq` describes."""
        ...


class Logits(Linear):
    """x W^T in float32 at least, also where x and W are narrower. Its dimension has no rule: whole on every rank."""

    dropless = True

    def __init__(self, experts: int, ctx: BuildContext, init: Init | None = None, bias: bool = False):
        super().__init__(ctx.hidden, Dim("router", experts), init or ctx.into(ctx.hidden), bias)
        self.layer = ctx.layer

    def logits(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, e], without the bias
        x = wide(x)
        return F.linear(x, local(self.weight).to(x.dtype))


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def salt(*site: object) -> Tensor:
    """Tells the chance of one place in the model from that of others: a key for nn.counter is seq.key ^ salt."""
    return torch.tensor(counter.key("router", *site), device="cpu")  # a number is a constant to a compiler


def numbered(seq: Sequence, split: TokenSplit, width: int) -> Tensor:
    """[b, s/parts, width] int64: for each of `width` channels of each token here a number of its own in the whole
    batch of the step, the same on any layout."""
    token = seq.rows[:, None] * (seq.length or seq.documents.shape[1]) + split.places(seq)
    return token[..., None] * width + torch.arange(width, device=token.device)
