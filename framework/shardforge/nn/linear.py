"""The only matmuls with a weight, and the table lookup."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.nn.init import zeros
from shardforge.nn.module import Init, Module, local


class Linear(Module):
    """y = x W^T + bias.

    `once` is 0 on all ranks but the first where y is a partial sum over ranks. `rows` are those of the weight and the
    bias that this rank works with, None for all it has. `product(x, weight, bias)` is the matmul, or one that
    communicates beside it (nn.overlap).
    """

    def __init__(self, inp: Dim, out: Dim, init: Init, bias: bool = False):
        super().__init__()
        self.declare("weight", out, inp, init=init)
        if bias:
            self.declare("bias", out, init=zeros)
        self.biased = bias
        self.once = 1.0
        self.rows: slice | None = None
        self.product: Callable[..., Tensor] = F.linear

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        weight = local(self.weight, self.rows)
        if not self.biased:
            return self.product(x, weight)
        bias = local(self.bias, self.rows)
        return self.product(x, weight, bias if self.once == 1.0 else bias * self.once)


class Table(Module):
    """Rows of a weight by index. A rank that holds rows [first, first + n) returns zeros for the others."""

    def __init__(self, rows: Dim, width: Dim, init: Init):
        super().__init__()
        self.declare("weight", rows, width, init=init)
        self.first = 0
        self.rows = rows.size

    def forward(self, index: Tensor) -> Tensor:  # [b, s] -> [b, s, h]
        weight = local(self.weight)
        if weight.shape[0] == self.rows:
            return F.embedding(index, weight)
        index = index - self.first
        mine = (index >= 0) & (index < weight.shape[0])
        return F.embedding(index.clamp(0, weight.shape[0] - 1), weight) * mine[..., None]
