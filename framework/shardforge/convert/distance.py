"""How far two results are apart, one token at a time, and how far they may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Of the distance of a token's vector from the wanted one, relative to its length, after one part of the model that
    was given the same input: so it does not grow with depth."""

    error: float
    turned: float
    """Share of the tokens that may be further apart behind a mixture: rounding turns their choice of experts."""
    why: str


EXACT = Tolerance(0.0, 0.0, "the same function of the same numbers: bit for bit")
TOLERANCES = {
    "float32": Tolerance(3e-5, 0.1, "float32 in another order of sums: 1e-6 in 30 layers of width 576, more in wider"),
    "bfloat16": Tolerance(0.03, 0.5, "weights rounded to 8 bits, off by up to 2^-9: 3e-3 in 30 layers of width 576"),
    "float16": Tolerance(0.005, 0.25, "weights rounded to 11 bits, off by up to 2^-12: 4e-4 in 30 layers of width 576"),
}
"""By the coarser number type of the two sides. The measurements are of SmolLM2-135M, on 22 November 2026."""


@dataclass(frozen=True)
class Layer:
    """One place of the model where two computations were compared."""

    name: str  # "embed", "blocks.3", "norm", "logits", "mtp.0"
    max_abs: float  # of two computations from the token ids on
    cosine: float
    error: float  # relative, of the token that is furthest apart, where both were given the same input


class Gauge:
    """Sums over pieces of [1, s, c] of two results that are compared."""

    def __init__(self, length: int):
        self.max_abs = 0.0
        self._apart, self._want, self._got, self._product = torch.zeros(4, length, dtype=torch.float64).unbind()

    def add(self, got: Tensor, want: Tensor) -> Gauge:
        """What is infinite or no number on both sides alike is equal."""
        got, want = got[0].double(), want[0].double()
        equal = (got == want) | (got.isnan() & want.isnan())
        apart = (got - want).masked_fill(equal, 0.0).nan_to_num(torch.inf, torch.inf, torch.inf).abs()
        got, want = (each.nan_to_num(0.0, 0.0, 0.0) for each in (got, want))
        self.max_abs = max(self.max_abs, float(apart.max()))
        for total, piece in (
            (self._apart, apart.square()),
            (self._want, want.square()),
            (self._got, got.square()),
            (self._product, got * want),
        ):
            total += piece.sum(-1)
        return self

    @property
    def cosine(self) -> float:
        sizes = float(self._want.sum() * self._got.sum()) ** 0.5
        if self.max_abs == 0.0:
            return 1.0
        return float(self._product.sum()) / sizes if sizes else 0.0

    def error(self, turned: float = 0.0) -> float:
        """Relative distance of the token that is furthest apart, the share `turned` of the worst left out."""
        each = (self._apart / self._want).sqrt().nan_to_num(0.0, torch.inf)  # 0 / 0: equal
        return float(each.sort().values[-1 - int(turned * len(each))])


def gauged(got: Tensor, want: Tensor) -> Gauge:
    return Gauge(want.shape[1]).add(got, want)
