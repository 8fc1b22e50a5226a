"""The feed-forward units of a mixture, side by side: each works on the rows of its own tokens."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.activations import CURVES, Activation
from shardforge.model.context import BuildContext
from shardforge.nn.fused import clamped, gated
from shardforge.nn.grouped import grouped_linear, grouped_linears
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
        weights = [local(getattr(self, name)) for name in self.reads]
        inner = self.unit(*grouped_linears(x, weights, counts, [self.bias(name) for name in self.reads]))
        return grouped_linear(inner, local(self.down), counts, self.bias("down", self.once))

    def bias(self, name: str, once: float = 1.0) -> Tensor | None:
        """`once` the bias of the weight of that name."""
        if not self.biased:
            return None
        bias = local(getattr(self, f"{name}_bias"))
        return bias if once == 1.0 else bias * once
