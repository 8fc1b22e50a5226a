"""What every engine does: forward and backward of one step, the update, and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shardforge.nn.batch import Batch


@dataclass(frozen=True)
class Losses:
    """Of the whole batch, over all ranks."""

    loss: float  # nats per scored token
    terms: Mapping[str, float]  # other reported parts of the objective, per scored token
    scored: int  # tokens with a label


@dataclass(frozen=True)
class UpdateStats:
    grad_norm: float  # before clipping, over all ranks


class Engine(Protocol):
    """Owns model and optimizer on this rank. A call is collective: all ranks make it with their part of the batch."""

    weights: int  # numbers in the whole model
    step_flops: float  # FLOP of forward and backward per sequence

    def forward_backward(self, batch: Batch, step: int) -> Losses:
        """Gradients of the mean loss over all scored tokens of all ranks; `step` keys the dropout."""
        ...

    def update(self, lr: float) -> UpdateStats:
        """Clip, optimizer step, gradients cleared."""
        ...

    def evaluate(self, batch: Batch) -> Losses:
        """Loss without gradients and without dropout."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint holds, by name."""
        ...

    def load(self, read: Callable[[dict[str, Tensor]], object]) -> None:
        """Give `state()` to `read`, which fills the tensors in place, and take over what it filled."""
        ...

    def describe(self) -> dict[str, object]:
        """Plain JSON by which another model's checkpoint is recognised; see `checkpoint.store.Store`."""
        ...
