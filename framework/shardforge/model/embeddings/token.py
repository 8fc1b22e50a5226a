"""A learned vector for each token.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.4.
Changes: x = scale * table[token], the scale rounded to the type of the vectors, as in Gemma Team 2024, "Gemma",
    arXiv:2403.08295, and its released code: bfloat16 makes 55.5 of sqrt(3072) = 55.43.
Cost: a lookup.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.options import option
from shardforge.core.slots import embeddings
from shardforge.model.context import BuildContext
from shardforge.nn.linear import Table
from shardforge.nn.sequence import Sequence


@embeddings.register("token")
@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    scale: float = option(1.0, "factor on the vectors; Gemma takes sqrt(hidden)", above=0)

    def build(self, ctx: BuildContext) -> Token:
        return Token(self, ctx)


class Token(Table):
    slot = "embed"

    def __init__(self, cfg: TokenConfig, ctx: BuildContext):
        super().__init__(ctx.vocab, ctx.hidden, ctx.table())
        self.scale = cfg.scale

    def forward(self, tokens: Tensor, seq: Sequence) -> Tensor:  # [b, s] -> [b, s, h]
        x = super().forward(tokens)
        return x if self.scale == 1.0 else x * x.new_full((), self.scale)
