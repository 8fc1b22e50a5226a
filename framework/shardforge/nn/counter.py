"""Random numbers without a generator: value = f(key, index). Any rank can draw any part of any tensor.

The bits are SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", section 4):
the mixed state of a counter that advances by the golden ratio. Everything is int64 arithmetic modulo 2**64, so the
bits are the same on every device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
LOW = 0xFFFFFFFF


def key(*parts: object) -> int:
    """A 63-bit key of anything that prints: key(seed, "blocks.0.mixer.q.weight")."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical shift to the right; torch's >> on int64 copies the sign."""
    return (x >> count) & ((1 << (64 - count)) - 1)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each index (int64, any shape); `key` is an int or a 0-d int64 tensor."""
    x = (index + 1) * GOLDEN + key
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def uniform(key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1) with 24 bits of resolution in float32, 53 in float64."""
    width = 53 if dtype == torch.float64 else 24
    return _shift(bits(key, index), 64 - width).to(dtype) * 2.0**-width


def normal(key: int | Tensor, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal by Box and Muller (1958) from the two halves of one 64-bit draw; |x| < 6.7.

    Computed in float64 and rounded once, so float32 and float64 weights start at the same numbers.
    """
    draw = bits(key, index)
    radius = ((_shift(draw, 32).double() + 1) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = (draw & LOW).double() * (2 * math.pi * 2.0**-32)
    return (radius * angle.cos_()).to(dtype)
