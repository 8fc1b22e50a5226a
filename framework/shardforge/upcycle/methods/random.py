"""Experts that start from nothing, in a model whose other weights are the dense one's.

Paper: the baseline "from scratch" of Nakamura et al. 2025, arXiv:2502.19261, for the experts alone.
Changes: every number of an expert comes from N(0, s^2), s being what `model.init` of the dense model gives the matrix;
    biases are zero, that of down too.
Cost: one normal number for each number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardforge.upcycle.method import Draw, Edit, Indices, Moments, Plain, Shape, methods


@methods.register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Plain):
    keeps_output_bias = False
    unchanged = False

    def neurons(self, draw: Draw, shape: Shape) -> Indices | None:
        return None if shape.expert == shape.dense else np.arange(shape.expert)

    def edit(self, draw: Draw, shape: Shape, matrix: str, moments: Moments, neurons: Indices | None) -> Edit:
        return Edit(np.arange(shape.expert), 0.0, shape.std[matrix])
