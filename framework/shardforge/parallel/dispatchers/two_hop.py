"""First between nodes, then inside them: a token crosses the network at most once for each node it needs.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.2.2.
Cost: h numbers out and back for each pair of a token and a node, between ranks of the same place in their nodes; then
    an exchange inside each node. Pays where k experts of a token lie on fewer nodes, and the network is slow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.dispatch import NOWHERE, Dispatch, Run, by_group, gathered_sum, spread
from shardforge.parallel.dispatchers.exchange import sizes, told


@dataclass(frozen=True)
class TwoHop:
    """`across` are the ranks of the same place in their nodes; `inside` dispatches over one node's `experts`.

    Node n has the experts [n * experts, (n + 1) * experts). What comes back from a node is already the weighted sum
    over its experts.
    """

    across: ProcessGroup
    experts: int
    inside: Dispatch

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        tokens, nodes = x.shape[0], self.across.size()
        every = torch.arange(nodes, device=x.device)
        home = expert.div(self.experts, rounding_mode="floor")  # [t, k]; NOWHERE stays on no node
        needed = (home[:, :, None] == every).any(1)  # [t, nodes]
        order, counts = by_group(every.where(needed, NOWHERE), nodes)
        sent, received = sizes(counts[:, None], told(counts[:, None], self.across), order.numel())
        order = order[: sum(sent)]

        def hop(each: Tensor) -> Tensor:
            return collectives.exchange(spread(each, order, nodes), sent, received, self.across)

        x, expert, weight = hop(x), hop(expert), hop(weight)
        first = self.across.rank() * self.experts
        here = (expert >= first) & (expert < first + self.experts)
        y = self.inside(x, (expert - first).where(here, NOWHERE), weight, run)
        return gathered_sum(collectives.exchange(y, received, sent, self.across), order, nodes, tokens)
