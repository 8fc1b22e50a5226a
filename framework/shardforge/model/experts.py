"""The feed-forward units of a mixture, side by side: each works on the rows of its own tokens."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.activations import CURVES, Activation
from shardforge.model.context import BuildContext
from shardforge.nn.fused import clamped, gated
from shardforge.nn.grouped import grouped_linear
from shardforge.nn.init import zeros
from shardforge.nn.module import Module, local

Form = Literal["glu", "mlp"]


class Experts(Module):
    """`chosen` of `experts` units meet each token.

    Weights gate and up [e, h, f], down [e, f, h]; with `bias` also gate_bias and up_bias [e, f], down_bias [e, h].
    `once` is 0 on all ranks but the first where each has a part of the width and results are added up.
    """

    slot = "experts"

    def __init__(
        self,
        ctx: BuildContext,
        *,
        experts: int,
        chosen: int,
        inner: int,
        form: Form = "glu",
        activation: Activation = "silu",
        bias: bool = False,
        clamp: float | None = None,
    ):
        super().__init__()
        e, h, f = Dim("expert", experts), ctx.hidden, Dim("expert_ffn", inner)
        self.chosen, self.hidden, self.biased, self.once = chosen, h.size, bias, 1.0
        self.reads = ("gate", "up") if form == "glu" else ("up",)
        curve = CURVES[activation]
        self.unit = curve if form == "mlp" else partial(gated, curve=curve)
        if clamp is not None:
            self.unit = partial(clamped, limit=clamp)
        for name in self.reads:
            self.declare(name, e, h, f, init=ctx.into(h))
        self.declare("down", e, f, h, init=ctx.out_of(f))
        if bias:
            for name in self.reads:
                self.declare(f"{name}_bias", e, f, init=zeros)
            self.declare("down_bias", e, h, init=zeros)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # [n, h] expert by expert, [e] -> [n, h]
        inner = self.unit(*(self.product(name, x, counts) for name in self.reads))
        return self.product("down", inner, counts, self.once)

    def product(self, name: str, x: Tensor, counts: Tensor, once: float = 1.0) -> Tensor:
        """x times the weight of that name, plus its bias `once`."""
        weight = local(getattr(self, name))
        if not self.biased:
            return grouped_linear(x, weight, counts)
        bias = local(getattr(self, f"{name}_bias"))
        return grouped_linear(x, weight, counts, bias if once == 1.0 else bias * once)
