"""A head whose logits are bent to stay within +-cap.

Paper: Gemma Team 2024, "Gemma 2", arXiv:2408.00118, section 2.
Changes: logits = cap * tanh(x W^T / cap), around the matrix of another head kind.
Cost: one tanh a logit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shardforge.core.errors import RecipeError
from shardforge.core.options import option
from shardforge.core.slots import Head as HeadSlot
from shardforge.core.slots import heads
from shardforge.model.context import BuildContext
from shardforge.nn.head import Head
from shardforge.nn.module import Module


@heads.register("softcap")
@dataclass(frozen=True, kw_only=True)
class SoftcapHeadConfig:
    cap: float = option(30.0, "bound of the logits", above=0)
    head: HeadSlot = option("tied", "the head whose logits are bent")

    def __post_init__(self) -> None:
        if isinstance(self.head, SoftcapHeadConfig):
            raise RecipeError("a softcap inside a softcap", "head", "give the inner head another kind")

    def build(self, ctx: BuildContext, embed: Module) -> SoftcapHead:
        return SoftcapHead(self.cap, self.head.build(ctx, embed))


class SoftcapHead(Head):
    def __init__(self, cap: float, inner: Head):
        super().__init__()
        self.cap, self.inner = cap, inner
        self.inner.slot = ""  # the outer head is the one that passes see

    def operand(self) -> Tensor:
        return self.inner.operand()

    def curve(self, logits: Tensor) -> Tensor:
        return self.cap * (logits / self.cap).tanh()

    def slope(self, curved: Tensor) -> Tensor:
        return 1 - (curved / self.cap).square()
