"""What attention mixers share: one description of the scores, and the cores that compute them."""

from __future__ import annotations

from torch import Tensor

from shardforge.nn.module import Module
from shardforge.nn.sequence import Mask, Sequence, visible


class AttentionCore(Module):
    """softmax(scale * q k^T, over visible keys) v; query head i reads key head i * m // n. Kinds differ in speed."""

    slot = "core"

    def __init__(self, mask: Mask, scale: float):
        super().__init__()
        self.mask, self.scale = mask, scale

    def prepare(self, seq: Sequence) -> None:
        """Make what the core reads from seq.tables; the dense mask unless a kind overrides this."""
        seq.prepare(self.mask, lambda: visible(self.mask, seq))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence) -> Tensor:
        """q [b, s, n, d], k [b, s, m, d], v [b, s, m, e] -> [b, s, n, e]."""
        raise NotImplementedError
