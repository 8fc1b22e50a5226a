"""Multi-head latent attention: keys and values of all heads grow from one narrow latent per token.

Paper: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, eq. 9-19 and 37-47; the sizes of V3 are arXiv:2412.19437.
Changes: c_q = N(x W_DQ), [q_c; q_r] = c_q W_UQ; [c_kv; k_r] = x W_DKV, [k_c; v] = N(c_kv) [W_UK; W_UV]; q_r of each
    head and k_r, one for all heads, carry the position; score = scale * (q_c k_c + q_r k_r). W_DQ and W_UQ are one
    matrix without `q_lora_rank`. `evaluation: absorbed` computes the same outside of training with [W_UK^T q_c; q_r]
    as queries, [N(c_kv); k_r] as the one key head and N(c_kv) as its values, and W_UV behind the weighted sum.
Cost: h r_q + r_q n (d + d_r) + h (r_kv + d_r) + r_kv n (d + d_v) + n d_v h weights, h n (d + d_r) in place of the first
    two without r_q; 2 n (d + d_r + d_v) FLOP a visible pair, absorbed 2 n (2 r_kv + d_r), 3.4 times as much in V3, for
    keys and values n (d + d_r + d_v) / (2 r_kv + d_r) times smaller in memory and between ranks of cp.
Limits: no biases. Every rank of tp computes the latents of the whole sequence, and between ranks of cp keys and values
    of all heads travel in the expanded form. Published weights turn the channels 2i with 2i + 1: they need
    position: {layout: interleaved}. Absorbed heads of r_kv + d_r channels may be wider than the 256 that flash-attn
    takes; flex computes them then, or sdpa without triton, while training stays with flash-attn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Mask, Norm, Position, mixers
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module, local
from shardforge.nn.sequence import Sequence


@mixers.register("mla")
@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    heads: int = option(REQUIRED, "heads", at_least=1)
    q_lora_rank: int | None = option(None, "width of the query latent; empty projects queries directly", at_least=1)
    kv_lora_rank: int = option(REQUIRED, "width of the latent that keys and values grow from", at_least=1)
    qk_nope_head_dim: int = option(REQUIRED, "width of a query or key head without position", at_least=1)
    qk_rope_head_dim: int = option(REQUIRED, "width of the part with position; keys share it", at_least=1)
    v_head_dim: int = option(REQUIRED, "width of a value head", at_least=1)
    position: Position = option("rope", "how order enters the parts with position")
    mask: Mask = option("causal", "which earlier positions are seen")
    norm: Norm = option("rmsnorm", "norm on the latents")
    scale: float | None = option(
        None, "factor on the scores; empty means 1/sqrt(qk_nope_head_dim + qk_rope_head_dim)", above=0
    )
    evaluation: Literal["expanded", "absorbed"] = option(
        "expanded", "outside of training: keys and values of every head, or the latents as one head for all"
    )

    def build(self, ctx: BuildContext) -> MLA:
        return MLA(self, ctx)


class MLA(Module):
    slot = "mixer"
    leaves = "out"

    def __init__(self, cfg: MLAConfig, ctx: BuildContext):
        super().__init__()
        h, n = ctx.hidden, Dim("heads", cfg.heads)
        self.heads, self.latent = cfg.heads, cfg.kv_lora_rank
        self.plain, self.turning, self.value = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
        width = self.plain + self.turning
        c, v = Dim("kv_latent", self.latent), n * Dim("head_dim", self.value)
        c_q = h if cfg.q_lora_rank is None else Dim("q_latent", cfg.q_lora_rank)
        self.q_down = self.q_norm = None
        if cfg.q_lora_rank is not None:
            self.q_down, self.q_norm = Linear(h, c_q, ctx.into(h)), cfg.norm.build(c_q)
        self.q = Linear(c_q, n * Dim("head_dim", width), ctx.into(c_q))
        self.kv_down = Linear(h, Dim("kv_latent", self.latent + self.turning), ctx.into(h))
        self.kv_norm = cfg.norm.build(c)
        self.kv_up = Linear(c, n * Dim("head_dim", self.plain + self.value), ctx.into(c))
        self.position = cfg.position.build(self.turning)
        self.core = ctx.core.build(cfg.mask, (cfg.scale or 1 / math.sqrt(width)) * self.position.score_scale)
        self.out = Linear(v, h, ctx.out_of(v))
        self.enters = ("q" if self.q_down is None else "q_down", "kv_down")
        self.absorbs = cfg.evaluation == "absorbed"
        self.latent_core = self.core.taking(self.latent + self.turning) if self.absorbs else self.core
        self.latent_core.trains = self.latent_core is self.core

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        q = self.q(x if self.q_down is None else self.q_norm(self.q_down(x)))
        q, q_r = _heads(q, self.plain, self.turning)  # [b, s, n, d], [b, s, n, d_r]
        c, k_r = self.kv_down(x).split([self.latent, self.turning], -1)  # [b, s, r], [b, s, d_r]
        q_r, k_r = self.position(q_r, seq), self.position(k_r[:, :, None], seq)
        attend = self.absorbed if self.absorbs and not seq.training else self.expanded
        return self.out(attend(q, q_r, self.kv_norm(c), k_r, seq).flatten(2))

    def expanded(self, q: Tensor, q_r: Tensor, c: Tensor, k_r: Tensor, seq: Sequence) -> Tensor:
        """q [b, s, n, d], q_r [b, s, n, d_r], c [b, s, r], k_r [b, s, 1, d_r] -> [b, s, n, d_v]."""
        k, v = _heads(self.kv_up(c), self.plain, self.value)  # [b, s, n, d], [b, s, n, d_v]
        q, k = torch.cat([q, q_r], -1), torch.cat([k, k_r.expand_as(q_r)], -1)
        return self.core(q, k, v, seq)

    def absorbed(self, q: Tensor, q_r: Tensor, c: Tensor, k_r: Tensor, seq: Sequence) -> Tensor:
        """The same numbers from attention over the latents, which all heads share."""
        up = local(self.kv_up.weight, self.kv_up.rows).unflatten(0, (-1, self.plain + self.value))
        into_q, out_of_c = up.split([self.plain, self.value], 1)  # W_UK [n, d, r], W_UV [n, d_v, r]
        q = torch.cat([torch.einsum("bsnd,ndr->bsnr", q, into_q), q_r], -1)
        c = c[:, :, None]
        mixed = self.latent_core(q, torch.cat([c, k_r], -1), c, seq)  # [b, s, n, r]
        return torch.einsum("bsnr,ner->bsne", mixed, out_of_c)

    def core_flops(self, pairs: float) -> float:
        """FLOP of scores and weighted sum, forward, for `pairs` visible (query, key) pairs over all heads and ranks;
        of the expanded form, in which training always is."""
        return 2.0 * pairs * self.heads * (self.plain + self.turning + self.value)

    @property
    def cache_numbers(self) -> int:
        """Numbers that generation keeps of a token: the latent and the part of the key with position."""
        return self.latent + self.turning


def _heads(x: Tensor, *widths: int) -> tuple[Tensor, ...]:  # [b, s, n * sum] -> [b, s, n, width] of each width
    return x.unflatten(-1, (-1, sum(widths))).split(list(widths), -1)
