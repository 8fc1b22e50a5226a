"""Rotary position embedding: queries and keys turn by an angle proportional to their position.

Paper: Su et al. 2021, "RoFormer", arXiv:2104.09864, eq. 34.
Changes: q and k are rotated before the scores; only a share `fraction` of the channels turns. Channel pairs are those
     of `layout`: (2i, 2i + 1) in the paper, GPT-J, DeepSeek and Llama 4, (i, i + width/2) in Llama 1 to 3, Qwen and
    gpt-oss. They are one function up to the order of rows of W_Q and W_K. `scaling` slows pairs down for sequences
    longer than those of the first training; it has no weights, so a run may go on with another one.
Cost: six operations a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import RopeScaling, positions
from shardforge.model.scaling import Scaling, frequencies
from shardforge.nn.fused import Pairing, rotate
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence


@positions.register("rope")
@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    base: float = option(10000.0, "the slowest pair turns once in about 2*pi*base positions", above=1)
    fraction: float = option(1.0, "share of the channels of a head that turn", above=0, at_most=1)
    layout: Pairing = option("half", "channels that turn together: i with i + width/2, or 2i with 2i + 1")
    scaling: RopeScaling | None = option(None, "how rates change for sequences longer than those of the first training")

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
        scaling: Scaling | None = cfg.scaling
        self.amplitude = 1.0 if scaling is None else scaling.amplitude
        self.score_scale = 1.0 if scaling is None else scaling.score_scale
        self.rates(1)  # what this scaling cannot do with this width is said before the run

    def prepare(self, seq: Sequence) -> None:
        seq.prepare(self.name, lambda: self.table(seq))

    def rates(self, length: int, device: torch.device | None = None) -> Tensor:
        """Radians a position, float64 [turning/2], in sequences of `length` tokens."""
        if self.cfg.scaling is None:
            return frequencies(self.cfg.base, self.turning, device)
        return self.cfg.scaling.rates(self.cfg.base, self.turning, length, device)

    def table(self, seq: Sequence) -> tuple[Tensor, Tensor]:
        """cos and sin, each [b, s, 1, turning/2]; angles in float64, because float32 is off by 5e-3 at 100k."""
        rates = self.rates(seq.length or seq.positions.shape[1], seq.positions.device)
        angle = seq.positions[:, :, None, None] * rates
        cos, sin = angle.cos(), angle.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos.to(seq.dtype), sin.to(seq.dtype)

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, n, d] -> [b, s, n, d]
        cos, sin = seq.tables[self.name]
        if self.whole:
            return rotate(x, cos, sin, self.cfg.layout)
        return torch.cat([rotate(x[..., : self.turning], cos, sin, self.cfg.layout), x[..., self.turning :]], -1)
