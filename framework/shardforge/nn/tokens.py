"""Which tokens a rank has, for modules that keep their own positions but need facts of whole sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.sequence import Sequence


@dataclass(frozen=True)
class TokenSplit:
    """This rank has slice `part` of `parts` of what `Sequence` describes; `group` shares each whole sequence.

    Without a group the whole sequences are here. Nothing here is differentiable.
    """

    part: int = 0
    parts: int = 1
    group: ProcessGroup | None = None

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """[b, s, ...] of the tokens that `Sequence` describes -> [b, s/parts, ...] of this rank's."""
        return x.chunk(self.parts, dim)[self.part]

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share the sequences."""
        if self.group is not None:
            x = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, group=self.group)
        return x

    def places(self, seq: Sequence) -> Tensor:
        """[s/parts]: the place in the whole sequence of each of this rank's tokens."""
        index = torch.arange(seq.documents.shape[1], device=seq.documents.device) if seq.index is None else seq.index
        return self.own(index, 0)

    def whole(self, x: Tensor, seq: Sequence) -> Tensor:
        """[b, s/parts, ...] of this rank's tokens -> [b, S, ...] of whole sequences, in their order."""
        if self.group is None:
            return x
        joined = collectives.gather(x, self.group, 1)
        return joined[:, collectives.gather(self.places(seq), self.group, 0).argsort()]
