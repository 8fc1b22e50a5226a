"""What the objective needs of a head: one matrix, and an elementwise curve on its products."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn.module import Module


@dataclass(frozen=True)
class VocabSplit:
    """The columns of this rank are [first, first + n) of the vocabulary; without a group all are here."""

    first: int = 0
    group: ProcessGroup | None = None

    def total(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def top(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


class Head(Module):
    """logits = curve(x W^T). `slope` is the curve's derivative, written in terms of its result."""

    slot = "head"

    def operand(self) -> Tensor:
        """This rank's rows of W, [v, h]."""
        raise NotImplementedError

    def curve(self, logits: Tensor) -> Tensor:
        return logits

    def slope(self, curved: Tensor) -> Tensor | None:
        """d curve / d logits, or None where it is 1 everywhere."""
        return None

    def forward(self, x: Tensor) -> Tensor:  # [b, s, h] -> [b, s, v]
        return self.curve(F.linear(x, self.operand()))
