"""Ulysses: for attention alone, each rank trades its part of the sequence for its part of the heads.

Paper: Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509.
Changes: an all-to-all before and one after the core, which sees whole sequences of heads / cp query heads.
Cost: 1/cp of queries, keys, values and results sent by each rank; kv heads that several ranks read are sent to each.
Limits: the query heads of a tp rank must be a multiple of cp.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.core.errors import LayoutError
from shardforge.nn import collectives
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence
from shardforge.parallel.attention import chunks
from shardforge.parallel.attention.exchange import whole

TOKENS, HEADS = 1, 2  # dimensions of [b, s, n, d]


@dataclass(frozen=True)
class Ulysses:
    group: ProcessGroup
    traced: ClassVar[bool] = True

    def prepare(self, core: Module, seq: Sequence) -> None:
        seq.prepare("whole sequence", lambda: self.sequence(seq))
        type(core).prepare(core, seq.tables["whole sequence"])

    def sequence(self, seq: Sequence) -> Sequence:
        places = whole(seq, self.group)
        return dataclasses.replace(
            seq, positions=places.positions, documents=places.documents, index=None, tables={}, keys=None
        )

    def forward(
        self, core: Module, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None
    ) -> Tensor:
        cp = self.group.size()
        if q.shape[HEADS] % cp:
            raise misfit(q.shape[HEADS], cp, type(core).__name__)
        copies = math.lcm(k.shape[HEADS], cp) // k.shape[HEADS]
        if copies > 1:  # so that a rank's query heads find theirs in its own equal share
            k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
        q, k, v = (chunks.natural(trade(x, self.group, HEADS, TOKENS), cp, TOKENS) for x in (q, k, v))
        own = None if sinks is None else sinks.chunk(cp)[self.group.rank()]
        y = type(core).forward(core, q, k, v, seq.tables["whole sequence"], own)
        return trade(chunks.by_rank(y, cp, TOKENS), self.group, TOKENS, HEADS)

    @staticmethod
    def describe(core: Module, cp: int, length: int) -> str:
        return f"ulysses: all {length} tokens of 1/{cp} of the heads"


def misfit(heads: int, cp: int, where: str) -> LayoutError:
    fits = math.gcd(heads, cp)
    return LayoutError(
        f"{heads} query heads on each tp rank cannot be traded {cp} ways over cp by ulysses",
        where,
        f"engine.context: gather or ring; or parallel.cp: {fits}, which divides {heads}",
    )


def trade(x: Tensor, group: ProcessGroup, give: int, take: int) -> Tensor:
    """Cut x along `give`, one piece for each rank; join what comes back along `take`. Backward does the reverse."""
    share = [len(x)] * group.size()
    got = collectives.exchange(torch.cat(x.chunk(group.size(), give)), share, share, group)
    return torch.cat(got.chunk(group.size()), take)
