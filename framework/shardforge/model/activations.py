"""Elementwise curves of feed-forward kinds, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # x * sigmoid(x); Elfwing et al. 2017, arXiv:1702.03118
    "gelu": F.gelu,  # x * Phi(x); Hendrycks and Gimpel 2016, arXiv:1606.08415
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv:2109.08668
}
