"""A rank that runs the whole depth of the model: one micro-batch after the other."""

from __future__ import annotations

import torch

from shardforge.engine.forward import Forward
from shardforge.model.decoder import Decoder
from shardforge.parallel import fully_shard


class Whole:
    """Without a pipeline. `zero`: see `NativeConfig`."""

    def __init__(self, model: Decoder, zero: int):
        self.model, self.zero = model, zero
        self.parts = (model,)

    def train(self, forward: Forward) -> None:
        for micro in range(len(forward)):
            fully_shard.sync(self.model, self.zero, last=micro == len(forward) - 1)
            forward(self.model, None, micro).backward()

    @torch.no_grad()
    def count(self, forward: Forward) -> None:
        """The forward passes alone. What they gather stays for those of `train`."""
        for micro in range(len(forward)):
            forward(self.model, None, micro)

    def evaluate(self, forward: Forward) -> None:
        self.count(forward)
        fully_shard.free(self.model)

    def renew(self) -> None:
        """To be called whenever weights have changed; no weight is here twice."""
