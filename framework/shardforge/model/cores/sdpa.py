"""torch's fused attention with a dense mask.

Paper: Dao 2023, "FlashAttention-2", arXiv:2307.08691, through torch.nn.functional.scaled_dot_product_attention.
Changes: fused; scores are never whole in memory, the mask is (four bytes a pair of positions).
Cost: as attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence, visible


@cores.register("sdpa")
@dataclass(frozen=True, kw_only=True)
class SDPAConfig:
    def build(self, mask: Mask, scale: float) -> SDPA:
        return SDPA(mask, scale)


class SDPA(AttentionCore):
    def prepare(self, seq: Sequence) -> None:
        seq.prepare(("added", self.mask), lambda: added(self.mask, seq))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = seq.tables["added", self.mask].to(q.dtype)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return y.transpose(1, 2)


def added(mask: Mask, seq: Sequence) -> Tensor:
    """The mask as numbers added to the scores, which torch would make of a boolean one in every layer again."""
    seen = visible(mask, seq)
    return torch.zeros(seen.shape, dtype=seq.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
