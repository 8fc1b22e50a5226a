"""Each position sees itself and everything before it in its document.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.3.
Changes: key position <= query position.
Cost: on average half of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.slots import masks


@masks.register("causal")
@dataclass(frozen=True, kw_only=True)
class Causal:
    window = None

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return q_pos >= k_pos

    def keys(self, length: int) -> int:
        return length * (length + 1) // 2
