"""torch's fused attention with a dense mask.

Paper: Dao 2023, "FlashAttention-2", arXiv:2307.08691, through torch.nn.functional.scaled_dot_product_attention.
Changes: fused; scores are never whole in memory, the mask is (four bytes a pair of positions).
Cost: as attention. Sinks are one more key, and heads at most eight channels wider.
Limits: no softcap: the fused kernels have no curve on the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence, visible


@cores.register("sdpa")
@dataclass(frozen=True, kw_only=True)
class SDPAConfig:
    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> SDPA:
        if softcap is not None:
            raise RecipeError(
                f"torch's fused attention cannot bend its scores to stay within softcap={softcap}",
                "model.core",
                "model.core: auto or eager, or on CUDA flex; or no softcap in any mixer",
            )
        return SDPA(mask, scale, sinks)


class SDPA(AttentionCore):
    def prepare(self, seq: Sequence) -> None:
        seq.prepare(("added", self.mask), lambda: added(self.mask, seq))
        if self.sinks:
            seq.prepare(("added, sink", self.mask), lambda: F.pad(seq.tables["added", self.mask], (0, 1)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if sinks is None:
            y = self.attend(q, k, v, seq.tables["added", self.mask])
        else:
            wider = sink_key(q, k, v, sinks / self.scale)
            y = self.attend(*wider, seq.tables["added, sink", self.mask])[..., : v.shape[-1]]
        return y.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.to(q.dtype), scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def sink_key(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key at the end, whose product with every query of head i is sinks[i], and its value of zeros.

    A further channel holds the sink in queries and 1 in that key alone, so that gradients of sinks come out of the
    fused kernel, which has none for an added mask. Widths of a multiple of eight are the ones that kernels take.
    q [b, n, s, d], k [b, m, t, d], v [b, m, t, e] -> [b, n, s, w], [b, m, t + 1, w], [b, m, t + 1, w].
    """
    b, n, s, d = q.shape
    width = 8 * (max(d, v.shape[-1]) // 8 + 1)
    q = F.pad(torch.cat([q, sinks[:, None, None].expand(b, n, s, 1)], -1), (0, width - d - 1))
    key = F.pad(k.new_ones(b, k.shape[1], 1, 1), (d, width - d - 1))
    k = torch.cat([F.pad(k, (0, width - d)), key], 2)
    return q, k, F.pad(v, (0, width - v.shape[-1], 0, 1))


def added(mask: Mask, seq: Sequence) -> Tensor:
    """The mask as numbers added to the scores, which torch would make of a boolean one in every layer again."""
    seen = visible(mask, seq)
    return torch.zeros(seen.shape, dtype=seq.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
