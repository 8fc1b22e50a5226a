"""Attention with as many key/value heads as you like: one each (MHA), groups (GQA), or one for all (MQA).

Paper: Ainslie et al. 2023, "GQA", arXiv:2305.13245; kv_heads = heads is Vaswani et al. 2017, arXiv:1706.03762;
    kv_heads = 1 is Shazeer 2019, "One Write-Head is All You Need", arXiv:1911.02150.
Changes: query head i reads key/value head i * kv_heads // heads. `sinks: learned` adds e^sink of each query head to the
    softmax's denominator, and nothing to its numerator (OpenAI 2025, gpt-oss, arXiv:2508.10925); sinks start at 0.
    `softcap` c bends the scaled scores s to c * tanh(s / c) (Gemma Team 2024, "Gemma 2", arXiv:2408.00118, section 2).
Cost: hidden * head_dim * (2 * heads + 2 * kv_heads) weights; 4 * heads * head_dim FLOP a visible pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from shardforge.core.dims import Dim
from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Mask, Norm, Position, mixers
from shardforge.model.context import BuildContext
from shardforge.nn.init import zeros
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module, local
from shardforge.nn.sequence import Sequence


@mixers.register("gqa")
@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    heads: int = option(REQUIRED, "query heads", at_least=1)
    kv_heads: int | None = option(None, "key/value heads; empty means as many as query heads", at_least=1)
    head_dim: int = option(REQUIRED, "width of a head", at_least=1)
    position: Position = option("rope", "how order enters queries and keys")
    mask: Mask = option("causal", "which earlier positions are seen")
    qk_norm: Norm | None = option(None, "norm on queries and keys, before the position")
    qk_norm_over: Literal["head", "all"] = option("head", "normalize each head alone, or all heads of a token together")
    bias: Literal["none", "qkv", "all"] = option("none", "which projections have biases")
    scale: float | None = option(None, "factor on the scores; empty means 1/sqrt(head_dim)", above=0)
    softcap: float | None = option(
        None, "bound that scores approach and never reach, by cap * tanh(score / cap); empty for none", above=0
    )
    sinks: Literal["none", "learned"] = option(
        "none", "a score of each query head that belongs to no key: it takes weight from all keys and adds no value"
    )

    def __post_init__(self) -> None:
        if self.heads % (self.kv_heads or self.heads):
            low = [m for m in range(1, math.isqrt(self.heads) + 1) if self.heads % m == 0]
            fits = sorted({*low, *(self.heads // m for m in low)})
            near = min(fits, key=lambda m: abs(m - self.kv_heads))
            raise RecipeError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}", fix=f"kv_heads: {near}")

    def build(self, ctx: BuildContext) -> GQA:
        return GQA(self, ctx)


class GQA(Module):
    slot = "mixer"
    enters, leaves = ("q", "k", "v"), "out"

    def __init__(self, cfg: GQAConfig, ctx: BuildContext):
        super().__init__()
        h, d = ctx.hidden, Dim("head_dim", cfg.head_dim)
        n, m = Dim("heads", cfg.heads) * d, Dim("kv_heads", cfg.kv_heads or cfg.heads) * d
        self.width, self.heads = cfg.head_dim, cfg.heads
        self.q = Linear(h, n, ctx.into(h), cfg.bias != "none")
        self.k = Linear(h, m, ctx.into(h), cfg.bias != "none")
        self.v = Linear(h, m, ctx.into(h), cfg.bias != "none")
        self.q_norm = self.k_norm = None
        self.norm_first = cfg.qk_norm_over == "all"  # before the heads are told apart
        if cfg.qk_norm is not None:
            self.q_norm = cfg.qk_norm.build(n if self.norm_first else d)
            self.k_norm = cfg.qk_norm.build(m if self.norm_first else d)
        self.position = cfg.position.build(cfg.head_dim)
        scale = (cfg.scale or 1 / math.sqrt(cfg.head_dim)) * self.position.score_scale
        self.register_parameter("sinks", None)
        if cfg.sinks == "learned":
            self.declare("sinks", Dim("heads", cfg.heads), init=zeros)
        self.core = ctx.core.build(cfg.mask, scale, cfg.sinks == "learned", cfg.softcap)
        self.out = Linear(n, h, ctx.out_of(n), cfg.bias == "all")

    def split(self, x: Tensor, norm: nn.Module | None) -> Tensor:  # [b, s, n * d] -> [b, s, n, d]
        if norm is None:
            return x.unflatten(-1, (-1, self.width))
        if self.norm_first:
            return norm(x).unflatten(-1, (-1, self.width))
        return norm(x.unflatten(-1, (-1, self.width)))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        q = self.position(self.split(self.q(x), self.q_norm), seq)
        k = self.position(self.split(self.k(x), self.k_norm), seq)
        v = self.split(self.v(x), None)
        sinks = None if self.sinks is None else local(self.sinks)
        return self.out(self.core(q, k, v, seq, sinks).flatten(2))

    def core_flops(self, pairs: float) -> float:
        """FLOP of scores and weighted sum, forward, for `pairs` visible (query, key) pairs over all heads and ranks."""
        return 4.0 * pairs * self.heads * self.width

    @property
    def cache_numbers(self) -> int:
        """Numbers that generation keeps of a token: a key and a value of every key/value head."""
        return self.k.weight.shape[0] + self.v.weight.shape[0]
