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
    """A curve and its derivative: slope(grad, x) = grad * d curve / dx."""

    curve: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.curve(x)


CURVES: dict[str, Elementwise] = {
    # x * sigmoid(x); Elfwing et al. 2017, arXiv:1702.03118
    "silu": Elementwise(F.silu, aten.silu_backward),
    # x * Phi(x); Hendrycks and Gimpel 2016, arXiv:1606.08415
    "gelu": Elementwise(F.gelu, aten.gelu_backward),
    "gelu_tanh": Elementwise(
        lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "relu": Elementwise(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
    # So et al. 2021, "Primer", arXiv:2109.08668
    "relu2": Elementwise(lambda x: F.relu(x).square(), lambda grad, x: grad * F.relu(x) * 2),
}
