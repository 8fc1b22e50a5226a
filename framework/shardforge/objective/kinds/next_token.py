"""Predict the next token of the document.

Paper: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1; the z term is
    Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5.
Changes: loss = -log p(next token) + z_loss * log(Z)^2, summed over scored positions.
Cost: the head's matmul, three times.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.options import option
from shardforge.core.slots import objectives
from shardforge.nn.head import Head, VocabSplit
from shardforge.nn.module import Module
from shardforge.objective.cross_entropy import cross_entropy


@objectives.register("next_token")
@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    z_loss: float = option(0.0, "weight of the squared log-normalizer; PaLM takes 1e-4", at_least=0)

    def build(self) -> NextToken:
        return NextToken(self)


class NextToken(Module):
    """Sums over this rank's scored positions: "total" to differentiate, "loss" and "z_loss" to report."""

    slot = "objective"

    def __init__(self, cfg: NextTokenConfig):
        super().__init__()
        self.z_loss = cfg.z_loss
        self.terms = ("loss", "z_loss") if cfg.z_loss else ("loss",)
        self.split = VocabSplit()

    def forward(self, x: Tensor, head: Head, labels: Tensor) -> dict[str, Tensor]:  # [b, s, h], [b, s]
        sums = cross_entropy(x, head, labels, self.z_loss, self.split)
        out = {"total": sums.total, "loss": sums.cross_entropy}
        return {**out, "z_loss": self.z_loss * sums.z} if self.z_loss else out
