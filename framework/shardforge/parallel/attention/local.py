"""Attention of some queries over some keys, with what is needed to join it with the rest of the keys.

A fused kernel that returns the log-sum-exp and takes it back can stand here; this one is plain torch, in tiles, so that
scores exist for a few queries at a time. Scores and sums are at least float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.nn.sequence import Mask, Places, seen

TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Memory for the scores of one tile: within the cache of a CPU, large enough to fill a GPU."""
FEWEST = 16
"""Queries in a tile at least; fewer make thin, slow matrix products."""


@dataclass(frozen=True)
class Rule:
    """What queries see of some keys, both runs of one sequence, the factor on the scores and their bound."""

    mask: Mask
    scale: float
    queries: Places
    keys: Places
    distance: int  # tokens from the first key to the first query, negative where it comes later
    softcap: float | None = None

    def reach(self, rows: slice) -> slice:
        """The keys that some of these queries can see, if all are of one document."""
        first = 0 if self.mask.window is None else self.distance + rows.start - self.mask.window + 1
        last = min(self.distance + rows.stop, self.keys.positions.shape[1])
        return slice(max(0, first), max(0, first, last))


def local_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """q [b, m, g, s, d], k [b, m, t, d], v [b, m, t, e] -> result [b, m, g, s, e], log-sum-exp [b, m, g, s].

    The result has the type of v. A query that sees none of these keys has result 0 and log-sum-exp -inf.
    """
    out, total = [], []
    for rows, keys in tiles(q, rule):
        score = scores(q, k, rule, rows, keys)
        top = score.logsumexp(-1)
        out.append(product((score - finite(top)[..., None]).exp_().to(v.dtype), v[:, :, keys]))
        total.append(top)
    return torch.cat(out, 3), torch.cat(total, 3)


def local_gradients(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, total: Tensor, grad: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from these keys alone, in the type of `total`: Dao 2023, arXiv:2307.08691, algorithm 2.

    total [b, m, g, s] is the log-sum-exp over all keys anywhere, grad [b, m, g, s, e] the gradient of the result over
    all keys, delta [b, m, g, s] the sum of grad * result.
    """
    dq = []
    dk, dv = torch.zeros_like(k, dtype=total.dtype), torch.zeros_like(v, dtype=total.dtype)
    for rows, keys in tiles(q, rule):
        score = scores(q, k, rule, rows, keys)
        weight = (score - finite(total[..., rows])[..., None]).exp_()
        mine = grad[..., rows, :]
        dv[:, :, keys] += product(weight.to(v.dtype).flatten(2, 3).mT, mine.flatten(2, 3))
        slope = (product(mine, v[:, :, keys].mT) - delta[..., rows, None]).mul_(weight).mul_(rule.scale)
        if rule.softcap is not None:  # d tanh = 1 - tanh^2; where a key is not seen the slope is zero already
            slope.mul_(1 - (score.clamp_(min=-rule.softcap) / rule.softcap).square())
        slope = slope.to(q.dtype)
        dq.append(product(slope, k[:, :, keys]))
        dk[:, :, keys] += product(slope.flatten(2, 3).mT, q[..., rows, :].flatten(2, 3))
    return torch.cat(dq, 3).to(total.dtype), dk, dv


def join(out: Tensor, total: Tensor, part: Tensor, part_total: Tensor) -> None:
    """Add the attention over further keys to that over some; `out` and `total` change in place, in their own type."""
    both = torch.logaddexp(total, part_total)
    kept, added = ((one - finite(both)).exp_()[..., None] for one in (total, part_total))
    out.mul_(kept).add_(part * added)
    total.copy_(both)


def join_sinks(out: Tensor, total: Tensor, sinks: Tensor) -> None:
    """Add the sinks [m * g] of the query heads, which have a score and no value; changes in place as `join` does."""
    both = torch.logaddexp(total, sinks.to(total.dtype).view(*total.shape[1:3], 1))
    out.mul_((total - both).exp_()[..., None])
    total.copy_(both)


def sink_gradients(sinks: Tensor, total: Tensor, delta: Tensor) -> Tensor:
    """Gradient [m * g] of the sinks from these queries: that of a key without value. `total` has the sinks in it."""
    weight = (sinks.to(total.dtype).view(*total.shape[1:3], 1) - total).exp_()
    return weight.mul_(delta).sum((0, 3)).neg_().flatten().to(sinks.dtype)


def finite(total: Tensor) -> Tensor:
    """Log-sum-exp to subtract: 0 where nothing is seen, because -inf - -inf is no number."""
    return total.masked_fill(total == float("-inf"), 0.0)


def tiles(q: Tensor, rule: Rule) -> Iterator[tuple[slice, slice]]:
    """Runs of queries whose scores fit, each with the keys in its reach."""
    b, m, g, s, _ = q.shape
    row = b * m * g * rule.keys.positions.shape[1] * torch.promote_types(q.dtype, torch.float32).itemsize
    size = max(FEWEST, TILE_BYTES[q.device.type] // row)
    for start in range(0, s, size):
        rows = slice(start, min(start + size, s))
        yield rows, rule.reach(rows)


def scores(q: Tensor, k: Tensor, rule: Rule, rows: slice, keys: slice) -> Tensor:
    """[b, m, g, s, t], -inf where a key is not seen."""
    score = product(q[..., rows, :], k[:, :, keys].mT).to(torch.promote_types(q.dtype, torch.float32)) * rule.scale
    if rule.softcap is not None:
        score = score.div_(rule.softcap).tanh_().mul_(rule.softcap)
    hidden = ~seen(rule.mask, rule.queries.at(rows), rule.keys.at(keys))
    return score.masked_fill_(hidden[:, None, None], float("-inf"))


def product(x: Tensor, y: Tensor) -> Tensor:
    """x [b, m, (g,) i, j] @ y [b, m, j, k].

    Not `matmul`: selective recompute keeps the results of that, and they would be all the scores.
    """
    flat = x.flatten(2, -2).flatten(0, 1)
    out = torch.baddbmm(flat.new_zeros(()), flat, y.flatten(0, 1), beta=0)
    return out.view(*x.shape[:-1], y.shape[-1])
