"""torch's fused attention with a dense boolean mask.

Paper: Dao 2023, "FlashAttention-2", arXiv:2307.08691, through torch.nn.functional.scaled_dot_product_attention.
Changes: fused; scores are never whole in memory, the mask is (one byte a pair of positions).
Cost: as attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence


@cores.register("sdpa")
@dataclass(frozen=True, kw_only=True)
class SDPAConfig:
    def build(self, mask: Mask, scale: float) -> SDPA:
        return SDPA(mask, scale)


class SDPA(AttentionCore):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seq.tables[self.mask], scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y.transpose(1, 2)
