"""What attention mixers share: one description of the scores, and the cores that compute them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from shardforge.nn.module import Module
from shardforge.nn.sequence import Mask, Sequence, visible


class AttentionCore(Module):
    """softmax(scale * q k^T, over visible keys) v; query head i reads key head i * m // n. Kinds differ in speed.

    With `softcap` c the scaled scores s are c * tanh(s / c), before the mask (Gemma 2, arXiv:2408.00118, section 2).

    With `sinks` each query head has one more score, the same for every query, in the denominator of the softmax: what
    it takes is lost to the keys (Xiao et al. 2023, arXiv:2309.17453; learned as in gpt-oss, arXiv:2508.10925).
    """

    slot = "core"
    exchanges: ClassVar[tuple[str, ...]] = ("gather", "ring", "ulysses")
    """What may bring together queries and keys of a sequence that several ranks share. "gather" hands the core keys
    from before its queries, in order (`Sequence.keys`); "ulysses" hands it the whole sequence of some heads; "ring"
    computes softmax(scale * q k^T) v in the core's place, softcap and sinks included, so a kind that computes anything
    else must leave it out."""

    trains = True
    """Whether it is called in training, which makes nothing ready for one that is not."""

    def __init__(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None):
        super().__init__()
        self.mask, self.scale, self.sinks, self.softcap = mask, scale, sinks, softcap

    def taking(self, width: int) -> AttentionCore:
        """A core of the same function that takes heads of `width` channels: this one unless a kind has a limit."""
        return self

    def prepare(self, seq: Sequence) -> None:
        """Make what the core reads from seq.tables; the dense mask unless a kind overrides this."""
        seq.prepare(self.mask, lambda: visible(self.mask, seq))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        """q [b, s, n, d], k [b, t, m, d], v [b, t, m, e], sinks [n] -> [b, s, n, e]; t = s unless `seq.keys` says
        otherwise. `sinks` are there if the core was built for them."""
        raise NotImplementedError


def kept(total: Tensor, sinks: Tensor) -> Tensor:
    """Share of the softmax that the sinks [n] leave to the keys, whose scores have the log-sum-exp `total` [b, n, s]:
    e^total / (e^total + e^sink)."""
    return torch.sigmoid(total - sinks[:, None])
