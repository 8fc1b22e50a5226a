"""A matrix of its own from vectors to logits.

Paper: Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.4.
Changes: logits = x W^T.
Cost: one matrix of vocab * hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.slots import heads
from shardforge.model.context import BuildContext
from shardforge.nn.head import Head
from shardforge.nn.module import Module, local


@heads.register("linear")
@dataclass(frozen=True, kw_only=True)
class LinearHeadConfig:
    def build(self, ctx: BuildContext, embed: Module) -> LinearHead:
        return LinearHead(ctx)


class LinearHead(Head):
    def __init__(self, ctx: BuildContext):
        super().__init__()
        self.declare("weight", ctx.vocab, ctx.hidden, init=ctx.into(ctx.hidden))

    def operand(self) -> Tensor:
        return local(self.weight)
