"""What scalings of rotary position embeddings share: how fast channels turn beyond the length of the first training."""

from __future__ import annotations

import torch
from torch import Tensor

from shardforge.core.errors import RecipeError


class Scaling:
    """Slows the turning of channels down. Kinds are frozen dataclasses; the config is the scaling."""

    @property
    def amplitude(self) -> float:
        """Factor on queries' and keys' turning channels, so its square is on their part of the scores."""
        return 1.0

    @property
    def score_scale(self) -> float:
        """Factor on whole scores, channels that do not turn included."""
        return 1.0

    def rates(self, base: float, width: int, length: int, device: torch.device | None = None) -> Tensor:
        """Radians a position, float64 [width/2], of the pairs of `width` turning channels in sequences of `length`."""
        raise NotImplementedError


def frequencies(base: float, width: int, device: torch.device | None = None) -> Tensor:
    """base^(-2i/width), float64 [width/2]: Su et al. 2021, arXiv:2104.09864, section 3.2.2."""
    return base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def stretched(base: float, width: int, ratio: float) -> float:
    """The base with which the slowest of the width/2 pairs turns `ratio` times slower, and the fastest as before."""
    if width <= 2:
        raise RecipeError(
            f"{width} turning channels are one pair, which turns by 1 a position whatever the base",
            "position.scaling",
            "let 4 channels or more turn, or scaling: {kind: linear}, which slows every pair down",
        )
    return base * ratio ** (width / (width - 2))
