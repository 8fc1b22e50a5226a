"""No position embedding: the causal mask alone tells order.

Paper: Kazemnejad et al. 2023, "The Impact of Positional Encoding on Length Generalization", arXiv:2305.19466.
Changes: queries and keys are used as they are.
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.slots import positions
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


@positions.register("nope")
@dataclass(frozen=True, kw_only=True)
class NopeConfig:
    def build(self, head_dim: int) -> Nope:
        return Nope()


class Nope(Module):
    score_scale = 1.0

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, n, d] -> [b, s, n, d]
        return x
