"""The embedding table again, as the matrix from vectors to logits.

Paper: Press and Wolf 2016, "Using the Output Embedding to Improve Language Models", arXiv:1608.05859.
Changes: logits = x E^T with the embedding table E.
Cost: no weights; the matmul of vocab * hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.slots import heads
from shardforge.model.context import BuildContext
from shardforge.nn.head import Head
from shardforge.nn.module import Module, local


@heads.register("tied")
@dataclass(frozen=True, kw_only=True)
class TiedHeadConfig:
    def build(self, ctx: BuildContext, embed: Module) -> TiedHead:
        return TiedHead(embed)


class TiedHead(Head):
    borrowed = ("embed",)

    def __init__(self, embed: Module):
        super().__init__()
        self.__dict__["embed"] = embed  # not a child: its weight has one name

    def operand(self) -> Tensor:
        return local(self.embed.weight)
