"""The flash-attn package, on documents laid end to end.

Paper: Dao 2023, "FlashAttention-2", arXiv:2307.08691.
Changes: fused; each document is its own sequence, so no mask exists at all.
Cost: visible pairs only.
Limits: CUDA, float16 or bfloat16, causal or windowed masks; needs `pip install 'shardforge[flash]'`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.errors import EngineError
from shardforge.core.optional import require
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence


@cores.register("flash")
@dataclass(frozen=True, kw_only=True)
class FlashConfig:
    def build(self, mask: Mask, scale: float) -> Flash:
        package = require("flash_attn", for_="model.core: flash", extra="flash", field="model.core")
        return Flash(mask, scale, package.flash_attn_varlen_func)


class Flash(AttentionCore):
    def __init__(self, mask: Mask, scale: float, attend):
        super().__init__(mask, scale)
        self.attend = attend

    def prepare(self, seq: Sequence) -> None:
        seq.prepare("flash", lambda: document_starts(seq.documents))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
            raise EngineError(
                f"flash-attn computes in float16 or bfloat16, and this model in {q.dtype}",
                "model.core",
                "precision.compute: bf16, or model.core: flex",
            )
        starts, longest = seq.tables["flash"]
        reach = -1 if self.mask.window is None else self.mask.window - 1  # the package counts keys before the query
        y = self.attend(
            *(x.flatten(0, 1) for x in (q, k, v)),
            starts,
            starts,
            longest,
            longest,
            softmax_scale=self.scale,
            causal=True,
            window_size=(reach, 0),
        )
        return y.unflatten(0, q.shape[:2])


def document_starts(documents: Tensor) -> tuple[Tensor, int]:
    """[b, s] -> (cumulative lengths [documents + 1] int32 over the flattened rows, the longest length)."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    starts = torch.cat([starts, starts.new_tensor([documents.numel()])])
    return starts.int(), int(starts.diff().max())
