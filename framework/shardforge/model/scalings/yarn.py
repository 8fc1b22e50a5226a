"""YaRN: fast pairs keep their rates, slow ones are interpolated, a ramp lies between, and attention gets sharper.

Paper: Peng et al. 2023, "YaRN", arXiv:2309.00071, section 3; the ramp over channels is that of the released
    code. `mscale` and `mscale_all_dim`: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, and its released code.
Changes: rate * ((1 - r) + r/factor) for pair i. ramp: dim has r = (i - low)/(high - low) within 0 and 1, low and high
    the pairs that turn beta_fast and beta_slow times in `original_length` positions, rounded down and up if `truncate`.
    ramp: rotation, the prose of the paper, has r from 0 at beta_fast turns to 1 at beta_slow, in equal steps of turns.
    With m(x) = 0.1 x ln(factor) + 1, queries' and keys' turning channels are multiplied by attention_factor, m(1) if
    empty; or by m(mscale)/m(mscale_all_dim), and then whole scores by m(mscale_all_dim)^2 too.
Cost: nothing. A few hundred steps of training at the new length make it work (0.1% of pretraining in the paper).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardforge.core.errors import ForgeError, Problems, RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import rope_scalings
from shardforge.model.scaling import Scaling, frequencies


@rope_scalings.register("yarn")
@dataclass(frozen=True, kw_only=True)
class YarnScaling(Scaling):
    factor: float = option(REQUIRED, "new length over the length of the first training", at_least=1)
    original_length: int = option(REQUIRED, "length of the first training", unit="tokens", at_least=1)
    beta_fast: float = option(32.0, "turns in that length above which a pair stays", above=0)
    beta_slow: float = option(1.0, "turns in that length below which a pair is interpolated by the factor", above=0)
    truncate: bool = option(True, "round the ends of the ramp over channels outward; gpt-oss does not")
    ramp: Literal["dim", "rotation"] = option("dim", "what the ramp is even in: channels, or turns")
    attention_factor: float | None = option(None, "factor on cos and sin; empty means 0.1 ln(factor) + 1", above=0)
    mscale: float | None = option(None, "DeepSeek: m(mscale)/m(mscale_all_dim) on cos and sin", at_least=0)
    mscale_all_dim: float | None = option(None, "DeepSeek: m(mscale_all_dim)^2 on whole scores", at_least=0)

    def __post_init__(self) -> None:
        problems: list[ForgeError] = []
        if self.beta_slow >= self.beta_fast:
            what = f"beta_slow={self.beta_slow} is not below beta_fast={self.beta_fast}"
            problems.append(RecipeError(what, fix="the published pair is 1.0 and 32.0"))
        if (self.mscale is None) != (self.mscale_all_dim is None):
            what = f"mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim}: one of them alone means nothing"
            problems.append(RecipeError(what, fix="give both, or attention_factor"))
        if self.attention_factor is not None and self.mscale is not None:
            what = f"attention_factor={self.attention_factor}, mscale={self.mscale}: both set the factor on cos and sin"
            problems.append(RecipeError(what, fix="keep one of them"))
        if self.ramp == "rotation" and not self.truncate:
            what = "truncate: false says how the ramp over channels ends, and ramp: rotation has none"
            problems.append(RecipeError(what, fix="remove truncate"))
        if problems:
            raise Problems(problems, "a yarn scaling")

    @property
    def amplitude(self) -> float:
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self.sharpness(self.mscale) / self.sharpness(self.mscale_all_dim)
        return self.attention_factor or self.sharpness(1.0)

    @property
    def score_scale(self) -> float:
        return 1.0 if self.mscale_all_dim is None else self.sharpness(self.mscale_all_dim) ** 2

    def sharpness(self, weight: float) -> float:
        """m(weight)."""
        return 0.1 * weight * math.log(self.factor) + 1.0

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        plain = frequencies(base, width, device)
        slowed = self.slowed_by_turns(plain) if self.ramp == "rotation" else self.slowed_by_channel(plain, base, width)
        return plain * ((1 - slowed) + slowed / self.factor)

    def slowed_by_turns(self, rates: Tensor) -> Tensor:
        turns = self.original_length * rates / (2 * math.pi)
        return ((self.beta_fast - turns) / (self.beta_fast - self.beta_slow)).clamp(0, 1)

    def slowed_by_channel(self, rates: Tensor, base: float, width: int) -> Tensor:
        def channel(turns: float) -> float:
            return width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        pair = torch.arange(len(rates), dtype=torch.float64, device=rates.device)
        return ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)  # a ramp without a length is a step after `low`
