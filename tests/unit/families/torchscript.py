"""A program of TorchScript, which writes a file as soon as torch.jit.load reads it."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn


class Writing(nn.Module):
    def __init__(self, marker: str):
        super().__init__()
        self.marker = marker
        self.written = 0

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        self.written = torch.from_file(state[0], True, 1).numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def run(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.load(path)


def program(path: Path, marker: Path) -> Path:
    """The program at `path`; it writes `marker`, which it has done once to show that it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Writing(str(marker))).save(str(path))
    run(path)
    marker.unlink()  # fails where the program had no effect
    return path
