"""Elementwise curves of feed-forward kinds, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class Elementwise:
    """A curve and its derivative: slope(grad, x, out) writes grad * d curve / dx."""

    curve: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], object]

    def __call__(self, x: Tensor) -> Tensor:
        return self.curve(x)


def _gelu(approximate: str) -> Elementwise:
    return Elementwise(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x, out: aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


CURVES: dict[str, Elementwise] = {
    # x * sigmoid(x); Elfwing et al. 2017, arXiv:1702.03118
    "silu": Elementwise(F.silu, lambda grad, x, out: aten.silu_backward.grad_input(grad, x, grad_input=out)),
    # x * Phi(x), or its approximation with tanh; Hendrycks and Gimpel 2016, arXiv:1606.08415
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Elementwise(F.relu, lambda grad, x, out: aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)),
    # So et al. 2021, "Primer", arXiv:2109.08668
    "relu2": Elementwise(
        lambda x: F.relu(x).square(), lambda grad, x, out: torch.mul(grad, F.relu(x), out=out).mul_(2)
    ),
}
