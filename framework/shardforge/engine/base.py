"""What every engine does: forward and backward of one step, the update, and its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from shardforge.nn.batch import Batch
from shardforge.observe.experts import ExpertTally


@dataclass(frozen=True)
class Losses:
    """Of the whole batch, over all ranks."""

    loss: float  # nats per scored token
    terms: Mapping[str, float]  # other reported parts of the objective, per scored token
    scored: int  # tokens with a label
    experts: Mapping[int, ExpertTally] = field(default_factory=dict)  # by layer, of those that have experts


@dataclass(frozen=True)
class UpdateStats:
    grad_norm: float  # before clipping, over all ranks


class Engine(Protocol):
    """Owns model and optimizer on this rank. A call is collective: all ranks make it with their part of the batch."""

    weights: int  # numbers in the whole model
    step_flops: float  # FLOP of forward and backward per sequence

    def forward_backward(self, batch: Batch, step: int) -> Losses:
        """Gradients of the mean loss over all scored tokens of all ranks; `step` keys the dropout.

        A call sees how many steps are done by `step`, which counts from 0, and by `train.steps` of the recipe.
        """
        ...

    def update(self, lr: float) -> UpdateStats:
        """Clip, optimizer step, gradients cleared; then modules settle what they remember of the step's loads."""
        ...

    def evaluate(self, batch: Batch) -> Losses:
        """Loss and terms of the objective without gradients and without dropout; nothing is remembered of it.

        What modules record is left out: losses over the loads of a whole batch would need it twice.
        """
        ...

    def similarity(self) -> dict[int, float]:
        """By layer the mean cosine between the weights of two experts; to be called after `update` or `evaluate`."""
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
