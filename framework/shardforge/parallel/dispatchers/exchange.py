"""Tokens travel to the ranks of their experts, once for each assignment, and their results travel back.

Paper: Lepikhin et al. 2020, "GShard", arXiv:2006.16668, section 3.2, with uneven pieces instead of padded ones.
Cost: k * t * h numbers out and back from each rank, one exchange of counts, and one wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from shardforge.nn import collectives
from shardforge.nn.dispatch import Dispatch, Run, by_group, spread, weighted_sum
from shardforge.nn.grouped import listed


@dataclass(frozen=True)
class Exchange:
    """Rank r of the group has the experts [r * n, (r + 1) * n), where n = `experts` / ranks."""

    group: ProcessGroup
    experts: int

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        order, counts = by_group(expert, self.experts)
        counts = counts.view(self.group.size(), -1)  # [ranks, n]
        theirs = told(counts, self.group)
        sent, received = sizes(counts, theirs, order.numel())
        order = order[: sum(sent)]
        rows = collectives.exchange(spread(x, order, expert.shape[1]), sent, received, self.group)
        y = joined(rows, theirs, run)
        return weighted_sum(collectives.exchange(y, received, sent, self.group), order, weight)


@dataclass(frozen=True)
class Widened:
    """Another dispatch, to experts that are split over `group`: each rank computes its part for the tokens of all."""

    group: ProcessGroup
    inner: Dispatch

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        return self.inner(x, expert, weight, partial(self.run, run))

    def run(self, run: Run, x: Tensor, counts: Tensor) -> Tensor:
        ranks, rows = self.group.size(), x.shape[0]
        every = told(counts.expand(ranks, -1), self.group)
        sent, received = [rows] * ranks, listed(every.sum(1), ranks * rows)
        y = joined(collectives.exchange(x.repeat(ranks, 1), sent, received, self.group), every, run)
        return collectives.exchange(y, received, sent, self.group).view(ranks, rows, x.shape[1]).sum(0)


def told(counts: Tensor, group: ProcessGroup) -> Tensor:
    """counts [ranks, n] of the rows for each rank -> [ranks, n] of the rows from each rank."""
    theirs = counts.new_empty(counts.shape)
    dist.all_to_all_single(theirs, counts.contiguous(), group=group)
    return theirs


def sizes(sent: Tensor, received: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Rows for and from each rank, of [ranks, n] counts, at most `rows` in all. One wait for both."""
    out, back = listed(torch.stack([sent.sum(1), received.sum(1)]), rows)
    return out, back


def joined(rows: Tensor, counts: Tensor, run: Run) -> Tensor:
    """run on rows [t, h] that lie source by source, expert by expert inside each; counts [sources, n]."""
    sources, n = counts.shape
    expert = torch.arange(n, device=rows.device).repeat(sources)
    expert = expert.repeat_interleave(counts.flatten(), output_size=rows.shape[0])
    order = expert.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=rows.device)
    return spread(run(spread(rows, order, 1), counts.sum(0)), back, 1)
