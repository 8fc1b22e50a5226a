"""The definition of attention, step by step; the reference of all other cores.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, eq. 1.
Changes: nothing is fused; scores and softmax are at least float32.
Cost: a score for each pair of positions in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence


@cores.register("eager")
@dataclass(frozen=True, kw_only=True)
class EagerConfig:
    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> Eager:
        return Eager(mask, scale, sinks, softcap)


class Eager(AttentionCore):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, n, s, d], [b, m, s, d]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = (q @ k.transpose(2, 3) * self.scale).to(torch.promote_types(q.dtype, torch.float32))
        if self.softcap is not None:
            score = self.softcap * (score / self.softcap).tanh()
        score = score.masked_fill(~seq.tables[self.mask], float("-inf"))
        if sinks is not None:
            score = torch.cat([score, sinks.to(score.dtype)[:, None, None].expand(*score.shape[:3], 1)], -1)
        weight = score.softmax(-1)[..., : k.shape[2]].to(v.dtype)
        return (weight @ v).transpose(1, 2)
