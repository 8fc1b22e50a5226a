"""Experts that are noisy copies of the dense ffn.

Paper: the baseline "random noise upcycling" of Nakamura et al. 2025, "Drop-Upcycling", arXiv:2502.19261.
Changes: N(0, std^2) is added to the numbers of floor(ratio * f) neurons of each expert, which are chosen as in `drop`.
Cost: one normal number for each number changed.
Limits: biases of gate and up gain noise with their neuron; the bias of down is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.options import option
from shardforge.upcycle.method import Draw, Edit, Indices, Moments, Plain, Shape, methods, scattered, touched


@methods.register("noise")
@dataclass(frozen=True, kw_only=True)
class Noise(Plain):
    ratio: float = option(0.5, "share of an expert's neurons that gain noise", at_least=0, at_most=1)
    std: float = option(0.02, "standard deviation of the noise", at_least=0)
    share_indices: bool = option(True, "the same neurons in all matrices")

    @property
    def unchanged(self) -> bool:
        return self.ratio == 0.0 or self.std == 0.0

    def neurons(self, draw: Draw, shape: Shape) -> Indices | None:
        return scattered(draw, shape, self.share_indices)

    def edit(self, draw: Draw, shape: Shape, matrix: str, moments: Moments, neurons: Indices | None) -> Edit:
        return Edit(touched(draw, shape, matrix, self.ratio, self.share_indices), 0.0, self.std, added=True)
