"""Experts that are copies of the dense ffn.

Paper: Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    arXiv:2212.05055.
Changes: nothing: where the weights of the chosen experts add up to 1 the model is the dense one at step 0. An expert
    narrower than the dense ffn takes a random choice of its neurons.
Cost: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.upcycle.method import Plain, methods


@methods.register("naive")
@dataclass(frozen=True, kw_only=True)
class Naive(Plain):
    pass
