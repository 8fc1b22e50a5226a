"""FlexAttention: the mask is a function, blocks of positions that see nothing are skipped.

Paper: Dong et al. 2024, "Flex Attention", arXiv:2412.05496.
Changes: fused and block-sparse; compiled on CUDA. Sinks scale the result by what they leave to the keys, which follows
    from the log-sum-exp of the scores; a softcap is a function of each score inside the kernel.
Cost: blocks of 128 x 128 visible pairs only.
Limits: torch has no backward for it on CPU, so there it serves evaluation only.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.errors import EngineError
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore, kept
from shardforge.nn.sequence import Mask, Sequence


@cores.register("flex")
@dataclass(frozen=True, kw_only=True)
class FlexConfig:
    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> Flex:
        return Flex(mask, scale, sinks, softcap)


class Flex(AttentionCore):
    def prepare(self, seq: Sequence) -> None:
        seq.prepare(("flex", self.mask), lambda: self.block_mask(seq))

    def block_mask(self, seq: Sequence):
        from torch.nn.attention.flex_attention import create_block_mask

        keys, mask = seq.keys or seq, self.mask

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = seq.documents[b, q] == keys.documents[b, k]
            return same & mask.visible(seq.positions[b, q], keys.positions[b, k])

        rows, length = seq.positions.shape
        return create_block_mask(sees, rows, None, length, keys.positions.shape[1], device=str(seq.positions.device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            raise EngineError(
                "FlexAttention has no backward on CPU", "model.core", "train with model.core: auto, sdpa or eager"
            )
        bend = None if self.softcap is None else _bend(self.softcap)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = functools.partial(
            _attend(q.device.type),
            score_mod=bend,
            block_mask=seq.tables["flex", self.mask],
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        if sinks is None:
            return attend(q, k, v).transpose(1, 2)
        from torch.nn.attention.flex_attention import AuxRequest

        y, beside = attend(q, k, v, return_aux=AuxRequest(lse=True))
        return (y * kept(beside.lse, sinks)[..., None].to(y.dtype)).transpose(1, 2)


@functools.cache
def _bend(cap: float):
    """cap * tanh(score / cap), one function for each cap, so that layers of the same share a compiled kernel."""

    def bent(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return bent


@functools.cache
def _attend(device: str):
    """The flex kernel: compiled where it trains, eager on CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
