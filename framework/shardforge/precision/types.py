"""Names of number types in recipes, as torch types."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
