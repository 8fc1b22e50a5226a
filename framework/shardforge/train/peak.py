"""What this machine reaches in plain matrix products, measured at the start; training is reported as a share of it."""

from __future__ import annotations

import time

import torch

SIZE = {"cpu": 768, "cuda": 8192}
TRIES = 5


def measure(device: torch.device, dtype: torch.dtype, size: int = 0) -> float:
    """FLOP/s of this rank's device: the best of a few square products of the compute type, of a size that fills it."""
    size = size or SIZE[device.type]
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(TRIES + 1):  # the first one warms up
        _settle(device)
        begun = time.perf_counter()
        a @ a
        _settle(device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
