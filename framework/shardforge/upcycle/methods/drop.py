"""Experts that keep a part of the dense neurons and start the others anew, with the statistics of what they replace.

Paper: Nakamura et al. 2025, "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization",
    arXiv:2502.19261, section 3; `share_indices: false` is the released conversion script.
Changes: each expert is a copy in which floor(ratio * f) of the f neurons are drawn again: their rows of gate and up and
    their columns of down come from N(m, s^2), m and s being mean and standard deviation of just these numbers, for each
    matrix alone. Without shared indices the neurons of an expert come in random order first, which changes nothing,
    and then each matrix draws a set of its own, so that a neuron is whole in (1 - ratio)^3 of all cases and not in
    1 - ratio. An expert narrower than the dense ffn takes a random choice of its neurons, and draws a part of these.
Cost: one normal number for each number drawn anew.
Limits: biases of gate and up belong to their neuron and are drawn with it; the bias of down is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.options import option
from shardforge.upcycle.method import Draw, Edit, Indices, Moments, Plain, Shape, methods, scattered, touched


@methods.register("drop")
@dataclass(frozen=True, kw_only=True)
class Drop(Plain):
    ratio: float = option(0.5, "share of an expert's neurons that is drawn anew", at_least=0, at_most=1)
    share_indices: bool = option(True, "the same neurons in all matrices; false is what the released script does")

    @property
    def unchanged(self) -> bool:
        return self.ratio == 0.0

    def neurons(self, draw: Draw, shape: Shape) -> Indices | None:
        return scattered(draw, shape, self.share_indices)

    def edit(self, draw: Draw, shape: Shape, matrix: str, moments: Moments, neurons: Indices | None) -> Edit:
        places = touched(draw, shape, matrix, self.ratio, self.share_indices)
        mean, std = moments.of(places if neurons is None else neurons[places])
        return Edit(places, mean, std)
