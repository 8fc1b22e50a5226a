"""All-gather of keys and values: any core, any mask, each rank its own queries.

Paper: Llama team 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.2 (context parallelism).
Changes: each of a rank's two chunks of queries meets the keys from the start of its window, or of the sequence, to its
    own end; what lies beyond is never computed.
Cost: an all-gather of keys and values a layer, a reduce-scatter backward; a rank holds those of a whole sequence.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.module import Module
from shardforge.nn.sequence import Mask, Sequence
from shardforge.parallel.attention import chunks
from shardforge.parallel.attention.exchange import pack, whole


@dataclass(frozen=True)
class Gather:
    group: ProcessGroup
    traced: ClassVar[bool] = True

    def prepare(self, core: Module, seq: Sequence) -> None:
        name = ("pieces", core.mask.window)
        seq.prepare(name, lambda: pieces(core.mask, seq, self.group))
        for piece in seq.tables[name]:
            type(core).prepare(core, piece)

    def forward(
        self, core: Module, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None
    ) -> Tensor:
        parts = zip(q.chunk(2, 1), self.keys(core, pack(k, v)), seq.tables["pieces", core.mask.window], strict=True)
        width = k.shape[-1]
        done = [type(core).forward(core, x, kv[..., :width], kv[..., width:], piece, sinks) for x, kv, piece in parts]
        return torch.cat(done, 1)

    def keys(self, core: Module, kv: Tensor) -> list[Tensor]:
        """Keys and values [b, t, m, d + e] that each of the two chunks of queries [b, s/2] reads."""
        cp, size = self.group.size(), kv.shape[1] // 2
        every = chunks.sorted_chunks(collectives.gather(kv, self.group, 1), cp, 1)
        out = []
        for number in chunks.held(cp, self.group.rank()):
            skipped, inside = divmod(first_key(core.mask, number * size), size)
            out.append(torch.cat(every[skipped : number + 1], 1)[:, inside:])
        return out

    @staticmethod
    def describe(core: Module, cp: int, length: int) -> str:
        return f"gather: keys and values of all {length} tokens"


def first_key(mask: Mask, query: int) -> int:
    """Place of the first key that a query at this place may see."""
    return 0 if mask.window is None else max(0, query - mask.window + 1)


def pieces(mask: Mask, seq: Sequence, group: ProcessGroup) -> tuple[Sequence, Sequence]:
    """What a core is told of each of the two chunks of queries: it sees keys up to its own end."""
    places, size = whole(seq, group), seq.positions.shape[1] // 2
    out = []
    for number in chunks.held(group.size(), group.rank()):
        first, last = number * size, (number + 1) * size
        begin, queries = first_key(mask, first), places.at(slice(first, last))
        out.append(
            dataclasses.replace(
                seq,
                positions=queries.positions,
                documents=queries.documents,
                keys=places.at(slice(begin, last)),
                index=torch.arange(first, last, device=seq.positions.device),
                tables={},
            )
        )
    return tuple(out)
