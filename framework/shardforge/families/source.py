"""Weights that somebody trained, as one thing to read from, whoever wrote them and in whatever files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Info:
    """A weight before it is read: its whole shape, and its type as stored, like "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


class Source(Protocol):
    """Weights under ShardForge's names. Nothing is read before it is asked for, and nothing is ever written.

    Reading holds one weight in memory, and of weights that lie fused in a file all that are fused with it.
    """

    path: Path
    model: dict[str, Any]  # the `model` section of a recipe, every field of it, as plain data
    names: Mapping[str, Info]  # "blocks.3.ffn.gate.weight", in the order of the model
    moments: tuple[str, ...]  # the optimizer's tensors that every weight has, ("exp_avg", "exp_avg_sq"); () for none
    counts: tuple[str, ...]  # single numbers that it keeps for every weight, ("step",)

    def read(self, name: str) -> Tensor:
        """The whole weight on the CPU, in the type of `names`. CheckpointError when the file cannot give it."""
        ...

    def read_moment(self, kind: str, name: str) -> Tensor:
        """What the optimizer keeps for a weight: of the weight's shape for a kind of `moments`, of shape [] for one of
        `counts`."""
        ...
