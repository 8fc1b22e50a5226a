"""A learned vector for each token plus one for each position in the document.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2).
Changes: x = table[token] + positions[position].
Cost: two lookups.
Limits: documents longer than `length` cannot be embedded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import embeddings
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Table
from shardforge.nn.sequence import Sequence


@embeddings.register("learned")
@dataclass(frozen=True, kw_only=True)
class LearnedConfig:
    length: int = option(REQUIRED, "positions that have a vector", unit="tokens", at_least=1)

    def build(self, ctx: BuildContext) -> Learned:
        return Learned(self, ctx)


class Learned(Table):
    """`once` is 0 on all ranks but the first where the result is a partial sum over ranks."""

    slot = "embed"

    def __init__(self, cfg: LearnedConfig, ctx: BuildContext):
        super().__init__(ctx.vocab, ctx.hidden, ctx.table())
        self.places = Table(Dim("position", cfg.length), ctx.hidden, ctx.table())
        self.once = 1.0

    def forward(self, tokens: Tensor, seq: Sequence) -> Tensor:  # [b, s] -> [b, s, h]
        return super().forward(tokens) + self.once * self.places(seq.positions)
