"""Every rank sees every token and computes the share of its own experts.

Cost: t * h numbers from each rank to all others and back, however few of the tokens a rank needs; no wait for counts
of other ranks. Cheapest where most tokens go to most ranks, and over etp alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.dispatch import NOWHERE, Local, Run


@dataclass(frozen=True)
class Gather:
    """`group` holds all experts once; this rank has `experts` of them, whole or in part, from number `first` on.

    All ranks of the group must bring as many tokens.
    """

    group: ProcessGroup
    experts: int
    first: int

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        x, expert, weight = (collectives.gather(each, self.group, 0) for each in (x, expert, weight))
        mine = (expert >= self.first) & (expert < self.first + self.experts)
        here = Local(self.experts, dropless=False)
        y = here(x, (expert - self.first).where(mine, NOWHERE), weight, run)
        return collectives.scatter_sum(y, self.group, 0)
