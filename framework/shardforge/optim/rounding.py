"""Fewer bits without bias: float32 to bfloat16, up or down at random, with a chance that makes the mean exact.

Paper: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", arXiv:1502.02551, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOST = 16
"""Bits of a float32 that a bfloat16 does not have; both have the same sign and exponent."""


def stochastic(x: Tensor, draw: Tensor) -> Tensor:
    """`x` in bfloat16. `draw` (int64, shape of x) gives each number its randomness in the lowest 16 bits.

    A number between two neighbours a < x < b becomes b with probability (x - a) / (b - a) in steps of 2**-16. What
    bfloat16 holds exactly stays: zero, infinities, and numbers rounded before. Float64 goes through float32 first.
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = (draw & ((1 << LOST) - 1)).to(torch.int32)
    kept = (bits + noise) & -(1 << LOST)
    return torch.where(x.isnan(), x, kept.view(torch.float32)).to(torch.bfloat16)
