"""No normalization.

Paper: none; the empty choice, for post-norm models (no norm before the head) and ablations.
Changes: y = x.
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.slots import norms
from shardforge.nn.module import Module


@norms.register("none")
@dataclass(frozen=True, kw_only=True)
class NoNormConfig:
    def build(self, dim: Dim) -> NoNorm:
        return NoNorm()


class NoNorm(Module):
    def forward(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        return x
