"""Rotary position embedding: queries and keys turn by an angle proportional to their position.

Paper: Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 34; channel pairs are (i, i + width/2).
Changes: q and k are rotated before the scores; only a share `fraction` of the channels turns.
Cost: six operations a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import positions
from shardforge.nn.fused import rotate
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


@positions.register("rope")
@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    base: float = option(10000.0, "the slowest pair turns once in about 2*pi*base positions", above=1)
    fraction: float = option(1.0, "share of the channels of a head that turn", above=0, at_most=1)

    def build(self, head_dim: int) -> Rope:
        return Rope(self, head_dim)


class Rope(Module):
    def __init__(self, cfg: RopeConfig, head_dim: int):
        super().__init__()
        self.cfg, self.turning = cfg, int(head_dim * cfg.fraction)
        self.whole = self.turning == head_dim
        self.name = ("rope", cfg, head_dim)
        if self.turning % 2:
            raise RecipeError(
                f"head_dim={head_dim} * fraction={cfg.fraction} gives {self.turning} turning channels, an odd number",
                "position",
                "channels turn in pairs; choose an even number",
            )

    def prepare(self, seq: Sequence) -> None:
        seq.prepare(self.name, lambda: self.table(seq))

    def table(self, seq: Sequence) -> tuple[Tensor, Tensor]:
        """cos and sin, each [b, s, 1, turning/2]; angles in float64, because float32 is off by 5e-3 at 100k."""
        pair = torch.arange(0, self.turning, 2, dtype=torch.float64, device=seq.positions.device)
        angle = seq.positions[:, :, None, None] * self.cfg.base ** (-pair / self.turning)
        return angle.cos().to(seq.dtype), angle.sin().to(seq.dtype)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, n, d] -> [b, s, n, d]
        cos, sin = seq.tables[self.name]
        if self.whole:
            return rotate(x, cos, sin)
        return torch.cat([rotate(x[..., : self.turning], cos, sin), x[..., self.turning :]], -1)
