"""What stands between a mixer and its attention core when cp ranks share a sequence, and the passing of neighbours."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.module import Module
from shardforge.nn.sequence import Places, Sequence
from shardforge.parallel.attention import chunks


class Exchange(Protocol):
    """Takes the place of `prepare` and `forward` of a core; see `model.attention.AttentionCore` for shapes."""

    traced: ClassVar[bool]  # whether torch.compile can look inside; it cannot follow what neighbours send

    def prepare(self, core: Module, seq: Sequence) -> None: ...

    def forward(
        self, core: Module, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None
    ) -> Tensor: ...

    @staticmethod
    def describe(core: Module, cp: int, length: int) -> str:
        """What happens with a sequence of `length` tokens, in a few words."""
        ...


def whole(seq: Sequence, group: ProcessGroup) -> Places:
    """Where all tokens of the sequence stand, in natural order; gathered once a micro-batch."""

    def make() -> Places:
        both = collectives.gather(torch.stack([seq.positions, seq.documents]), group, 2)  # [2, b, S]
        return Places(*chunks.natural(both, group.size(), 2).unbind())

    seq.prepare("whole", make)
    return seq.tables["whole"]


def pack(k: Tensor, v: Tensor) -> Tensor:
    """k [b, s, m, d], v [b, s, m, e] -> [b, s, m, d + e], one tensor to send."""
    return torch.cat([k, v], -1)


def swap(sends: list[tuple[int, Tensor]], takes: list[tuple[int, Tensor]], group: ProcessGroup) -> Callable[[], None]:
    """Begin to send and to receive (rank of the group, contiguous tensor); call the result to wait for all.

    All of them are one batch, so it does not matter that every rank sends first.
    """
    operations = [_operation(dist.isend, peer, x, group) for peer, x in sends]
    operations += [_operation(dist.irecv, peer, x, group) for peer, x in takes]
    works = dist.batch_isend_irecv(operations) if operations else []
    return partial(_settle, works, operations)


def _settle(works: list[dist.Work], operations: list[dist.P2POp]) -> None:
    """`operations` hold what is sent, so that nothing is freed on its way."""
    for work in works:
        work.wait()


def _operation(kind: Callable, peer: int, x: Tensor, group: ProcessGroup) -> dist.P2POp:
    assert x.is_contiguous(), f"a view of {tuple(x.shape)} would be sent in the order of its memory"
    return dist.P2POp(kind, x, dist.get_global_rank(group, peer), group)
