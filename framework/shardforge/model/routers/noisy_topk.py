"""The k experts with the largest noisy logits, where the noise of each is learned; two losses keep them in use.

Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 3-6 and 8-11.
Changes: H = x W^T + noise * (softplus(x N^T) + noise_eps), noise standard normal, in training only; weights are the
    softmax over the k largest H. Added to the loss, for each pool of `sequences` rows of the batch and then averaged:
    importance * CV^2 of the experts' sums of weights, and load * CV^2 of their expected loads: sums over tokens of
    P_i = probability that i is among the k largest if its noise alone is drawn again. CV^2 = population variance /
    mean^2. W and N start at zero, so that all loads are even. Padding counts nowhere. Both losses are reported with
    their factors, added over layers.
Cost: 2 * hidden * experts weights, k + 1 passes over the logits to choose.
Limits: P_i needs a (k+1)-th expert. With k = 1 the weight is 1 and importance a count without a gradient. A pool lies
    inside one micro-batch; rows that are left over in evaluation are a smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import routers
from shardforge.model.balance import whole_pools
from shardforge.model.context import BuildContext
from shardforge.model.groups import highest
from shardforge.model.routing import Logits, Routing, numbered, salt
from shardforge.nn import counter
from shardforge.nn.batch import PADDING
from shardforge.nn.init import zeros
from shardforge.nn.record import charge
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit

FLOOR = 1e-10
"""Added to a squared mean before it divides, as in the released code."""


@routers.register("noisy_topk")
@dataclass(frozen=True, kw_only=True)
class NoisyTopKConfig:
    noise_eps: float = option(1e-2, "least standard deviation of the noise on a logit", above=0)
    importance: float = option(0.1, "factor of the loss on uneven sums of weights", at_least=0)
    load: float = option(0.1, "factor of the loss on uneven expected loads", at_least=0)
    sequences: int = option(1, "rows of the batch, one after the other, whose tokens are balanced together", at_least=1)

    def check(self, experts: int, k: int) -> None:
        if self.load and k >= experts:
            what = f"kind: noisy_topk expects loads from a (k+1)-th expert, and k={k} of experts={experts} leaves none"
            raise RecipeError(what, "router", f"k: at most {experts - 1}, or load: 0.0")

    def build(self, ctx: BuildContext, experts: int, k: int) -> NoisyTopK:
        return NoisyTopK(self, ctx, experts, k)


class NoisyTopK(Logits):
    def __init__(self, cfg: NoisyTopKConfig, ctx: BuildContext, experts: int, k: int):
        cfg.check(experts, k)
        super().__init__(experts, ctx, zeros)
        self.noise = Logits(experts, ctx, zeros)
        self.cfg, self.k, self.salt = cfg, k, salt("noise", ctx.layer)
        self.records = tuple(f"router_{name}" for name in ("importance", "load") if getattr(cfg, name))

    def prepare(self, seq: Sequence) -> None:
        """Refuse a micro-batch of training that cuts pools of sequences."""
        if seq.training and self.cfg.sequences > 1:
            seq.prepare(("pools", self.cfg.sequences), partial(whole_pools, seq, self.cfg.sequences, "router"))

    def forward(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:  # [b, s/parts, h]
        logits = self.logits(x)
        spread = F.softplus(self.noise.logits(x)) + self.cfg.noise_eps  # [b, s, e]
        noisy = logits
        if seq.key is not None:
            index = numbered(seq, split, logits.shape[-1])
            noisy = logits + spread * counter.normal(seq.key ^ self.salt, index, logits.dtype)
        order = highest(noisy, min(self.k + 1, noisy.shape[-1]))
        largest, expert = noisy.gather(-1, order), order[..., : self.k]
        weight = largest[..., : self.k].softmax(-1)
        real = (split.own(seq.documents) != PADDING)[..., None]
        if self.cfg.importance:
            sums = torch.zeros_like(logits).scatter(-1, expert, weight * real)
            weight = self.charged(weight, sums, "importance", seq, split)
        if self.cfg.load:
            chances = probabilities(logits, spread, largest, expert) * real
            weight = self.charged(weight, chances, "load", seq, split)
        return Routing(expert, weight, noisy.softmax(-1), logits)

    def charged(self, weight: Tensor, amounts: Tensor, name: str, seq: Sequence, split: TokenSplit) -> Tensor:
        """weight, charged with this rank's part of the loss on `amounts` [b, s, e], summed over each pool.

        The slope of CV^2 is taken at the whole pools' sums, which carry no gradient; each rank then differentiates the
        amounts of its own tokens, and reports the share of the value that they are of the sums.
        """
        b, rows = len(amounts), self.cfg.sequences
        pools = -(-b // rows)
        own = F.pad(amounts.sum(1), (0, 0, 0, pools * rows - b)).unflatten(0, (pools, rows)).sum(1)  # [pools, e]
        sizes = (b - rows * torch.arange(pools, dtype=own.dtype, device=own.device)).clamp(max=rows)
        factor = getattr(self.cfg, name) / seq.shares.sequences * sizes
        whole = split.total(own.detach())
        value = factor * unevenness(whole)  # [pools]
        here = own.detach().sum(-1) / whole.sum(-1).clamp(min=FLOOR)
        self.note(f"router_{name}", (value * here).sum(), seq)
        return charge(weight, (factor[:, None] * slope(whole) * own).sum())

    def note(self, name: str, value: Tensor, seq: Sequence) -> None:
        seq.record(name, self.layer, value)


def probabilities(logits: Tensor, spread: Tensor, largest: Tensor, expert: Tensor) -> Tensor:
    """[b, s, e]: the chance of each expert to be among the k largest if its noise alone is drawn again (eq. 8-9).

    `spread` are the deviations of the noise, `largest` [b, s, k + 1] the largest noisy logits, `expert` [b, s, k]
    whose the first k are.
    """
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, expert, True)
    bar = torch.where(inside, largest[..., -1:], largest[..., -2:-1])  # k-th largest of the others
    return torch.special.ndtr((logits - bar) / spread)


def unevenness(sums: Tensor) -> Tensor:
    """sums [..., e] -> [...]: the square of their coefficient of variation (eq. 7, 11), 0 where they are equal."""
    return sums.var(-1, correction=0) / (sums.mean(-1).square() + FLOOR)


def slope(sums: Tensor) -> Tensor:
    """[..., e]: the gradient of `unevenness`."""
    mean = sums.mean(-1, keepdim=True)
    below = mean.square() + FLOOR
    spread = sums.var(-1, correction=0, keepdim=True)
    return 2 / sums.shape[-1] * ((sums - mean) / below - mean * spread / below.square())
