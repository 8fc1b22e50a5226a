"""Matrix products of many small weights at once: one group of rows for each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

WIDTH_BYTES = 16
"""Rows of operands must be whole multiples of this for the grouped kernel."""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x [n, d] whose rows lie group by group, weight [e, d, f], counts [e] rows of each group -> [n, f].

    A group without rows gets a gradient of zeros. The gradient that arrives may have any strides.
    """
    if not _has_kernel(x, weight):
        parts = x.split(listed(counts, x.shape[0]))
        return torch.cat([rows @ each for rows, each in zip(parts, weight.unbind(0), strict=True)])
    y = F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)  # the kernel refuses expanded gradients
    return y


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """No kernel for float64, nor for rows that do not fill whole vectors; other types than bfloat16 have one on the
    CPU, of which torch's shape rules (a dry run, a compiler) do not know."""
    if x.shape[0] == 0 or any(width * x.element_size() % WIDTH_BYTES for width in weight.shape[1:]):
        return False
    eager = not (isinstance(x, FakeTensor) or torch.compiler.is_compiling())
    return x.dtype == torch.bfloat16 or (x.dtype in (torch.float32, torch.float16) and x.device.type == "cpu" and eager)


def listed(counts: Tensor, rows: int) -> list:
    """Counts [pieces] or [m, pieces] as numbers: the wait for the device that uneven pieces cost.

    A dry run has no numbers; there `rows` fall evenly on the pieces.
    """
    if not (isinstance(counts, FakeTensor) or counts.is_meta):
        return counts.tolist()
    pieces = counts.shape[-1]
    even = [rows // pieces + (piece < rows % pieces) for piece in range(pieces)]
    return even if counts.dim() == 1 else [even] * len(counts)
