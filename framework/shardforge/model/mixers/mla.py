"""Multi-head latent attention: keys and values of all heads grow from one narrow latent per token.

Paper: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, eq. 9-19 and 37-47; the sizes of V3 are arXiv:2412.19437.
Changes: c_q = N(x W_DQ), [q_c; q_r] = c_q W_UQ; [c_kv; k_r] = x W_DKV, [k_c; v] = N(c_kv) W_UKV; q_r of each head and
    k_r, one for all heads, carry the position; score = scale * (q_c k_c + q_r k_r). W_DQ and W_UQ are one matrix
    without `q_lora_rank`.
Cost: h r_q + r_q n (d + d_r) + h (r_kv + d_r) + r_kv n (d + d_v) + n d_v h weights, h n (d + d_r) in place of the first
    two without r_q; 2 n (d + d_r + d_v) FLOP a visible pair.
Limits: no biases. Every rank of tp computes the latents of the whole sequence, and between ranks of cp keys and values
    of all heads travel, not the latents. Channels turn in the pairs of `position`: rope takes i with i + d_r/2, the
    published weights 2i with 2i + 1, so converting them permutes these rows of W_UQ and W_DKV. The form that absorbs
    W_UKV into queries and result is for generation and not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Mask, Norm, Position, mixers
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module
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
        self.core = ctx.core.build(cfg.mask, cfg.scale or 1 / math.sqrt(width))
        self.out = Linear(v, h, ctx.out_of(v))
        self.enters = ("q" if self.q_down is None else "q_down", "kv_down")

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        q = self.q(x if self.q_down is None else self.q_norm(self.q_down(x)))
        q, q_r = _heads(q, self.plain, self.turning)  # [b, s, n, d], [b, s, n, d_r]
        c, k_r = self.kv_down(x).split([self.latent, self.turning], -1)  # [b, s, r], [b, s, d_r]
        k, v = _heads(self.kv_up(self.kv_norm(c)), self.plain, self.value)  # [b, s, n, d], [b, s, n, d_v]
        q_r, k_r = self.position(q_r, seq), self.position(k_r[:, :, None], seq)
        q, k = torch.cat([q, q_r], -1), torch.cat([k, k_r.expand_as(q_r)], -1)
        return self.out(self.core(q, k, v, seq).flatten(2))

    def core_flops(self, pairs: float) -> float:
        """FLOP of scores and weighted sum, forward, for `pairs` visible (query, key) pairs over all heads and ranks."""
        return 2.0 * pairs * self.heads * (self.plain + self.turning + self.value)


def _heads(x: Tensor, *widths: int) -> tuple[Tensor, ...]:  # [b, s, n * sum] -> [b, s, n, width] of each width
    return x.unflatten(-1, (-1, sum(widths))).split(list(widths), -1)
