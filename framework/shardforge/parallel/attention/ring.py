"""Ring attention: keys and values travel once around the cp ranks; each adds its own block of attention.

Paper: Liu, Zaharia, Abbeel 2023, "Ring Attention with Blockwise Transformers", arXiv:2310.01889; the zigzag order of
    chunks is Brandon et al. 2023, "Striped Attention", arXiv:2311.09431, in its two-chunk form.
Changes: results are joined by their log-sum-exp; gradients of keys and values travel on with them and come home.
Cost: keys and values of one rank in memory at a time, cp - 1 passes of them forward; backward as many again, and cp of
    their gradients, in float32. Blocks in which no query sees a key are not computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from shardforge.nn.module import Module
from shardforge.nn.sequence import Mask, Sequence
from shardforge.parallel.attention import chunks
from shardforge.parallel.attention.exchange import pack, swap, whole
from shardforge.parallel.attention.local import Rule, join, join_sinks, local_attention, local_gradients, sink_gradients


@dataclass(frozen=True)
class Block:
    """One of a rank's two chunks of queries against one of the two chunks of keys that are here."""

    query: int
    key: int
    rule: Rule


@dataclass(frozen=True)
class Ring:
    group: ProcessGroup
    traced: ClassVar[bool] = False

    def prepare(self, core: Module, seq: Sequence) -> None:
        seq.prepare(_name(core), lambda: plan(core.mask, core.scale, seq, self.group, core.softcap))

    def forward(
        self, core: Module, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None
    ) -> Tensor:
        return _Ring.apply(q, pack(k, v), k.shape[-1], seq.tables[_name(core)], self.group, sinks)

    @staticmethod
    def describe(core: Module, cp: int, length: int) -> str:
        return f"ring: keys and values of {length // cp} tokens at a time, {cp} times"


def _name(core: Module) -> tuple[Any, ...]:
    """Of what is planned for cores that compute the same."""
    return "ring", core.mask, core.scale, core.softcap


def plan(
    mask: Mask, scale: float, seq: Sequence, group: ProcessGroup, softcap: float | None = None
) -> list[list[Block]]:
    """What this rank computes when it holds its own keys, those of the rank to the left, and so on."""
    cp, rank, places = group.size(), group.rank(), whole(seq, group)
    size, pairs = places.positions.shape[1] // (2 * cp), visible_pairs(mask, places.documents, cp)

    def rule(query: int, key: int) -> Rule:
        queries, keys = (places.at(slice(number * size, (number + 1) * size)) for number in (query, key))
        return Rule(mask, scale, queries, keys, (query - key) * size, softcap)

    hops = []
    for hop in range(cp):
        mine, theirs = (list(enumerate(chunks.held(cp, holder % cp))) for holder in (rank, rank - hop))
        hops.append([Block(i, j, rule(query, key)) for i, query in mine for j, key in theirs if pairs[query][key]])
    return hops


def visible_pairs(mask: Mask, documents: Tensor, cp: int) -> list[list[bool]]:
    """[chunk of queries][chunk of keys]: whether any query may see any key. Documents are without gaps, so two chunks
    share one only where the last key and the first query are of the same; where tensors have no content, all do."""
    size = documents.shape[1] // (2 * cp)
    first, last = documents[:, ::size], documents[:, size - 1 :: size]  # [b, 2 cp]
    joined = (first[:, :, None] == last[:, None, :]).any(0)
    joined = [[True] * (2 * cp)] * (2 * cp) if isinstance(joined, FakeTensor) else joined.tolist()

    def sees(query: int, key: int) -> bool:
        distance = (query - key - 1) * size + 1  # from the last key to the first query
        near = mask.window is None or distance < mask.window
        return query == key or (query > key and near and joined[query][key])

    return [[sees(query, key) for key in range(2 * cp)] for query in range(2 * cp)]


class _Ring(Function):
    @staticmethod
    def forward(ctx, q, kv, width, hops, group, sinks):
        """q [b, s, n, d], kv [b, s, m, d + e], sinks [n] or None -> [b, s, n, e]."""
        q_heads, kv = grouped(q, kv.shape[2]), kv.transpose(1, 2).contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q_heads.new_zeros(*q_heads.shape[:-1], kv.shape[-1] - width, dtype=wide)
        total = q_heads.new_full(q_heads.shape[:-1], float("-inf"), dtype=wide)
        here = kv
        for hop, blocks in enumerate(hops):
            coming, wait = pass_on(here, group) if hop + 1 < len(hops) else (here, lambda: None)
            for block in blocks:
                keys, values = half(here, block.key, 2).tensor_split([width], -1)
                got = local_attention(half(q_heads, block.query, 3), keys, values, block.rule)
                join(half(out, block.query, 3), half(total, block.query, 3), *got)
            wait()
            here = coming
        if sinks is not None:  # once, when all keys were here
            join_sinks(out, total, sinks)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, kv, out, total, sinks)
        ctx.width, ctx.hops, ctx.group = width, hops, group
        return out.flatten(1, 2).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, here, out, total, sinks = ctx.saved_tensors
        group, width, last = ctx.group, ctx.width, len(ctx.hops) - 1
        q_heads, grad = grouped(q, here.shape[1]), grouped(grad, here.shape[1])
        delta = (grad.to(total.dtype) * out).sum(-1)
        dq = torch.zeros_like(q_heads, dtype=total.dtype)
        dkv, arrive = torch.zeros_like(here, dtype=total.dtype), lambda: None
        for hop, blocks in enumerate(ctx.hops):
            coming, wait = pass_on(here, group) if hop < last else (here, lambda: None)
            own = torch.zeros_like(dkv)
            for block in blocks:
                keys, values = half(here, block.key, 2).tensor_split([width], -1)
                mine, theirs = (half(x, block.query, 3) for x in (q_heads, grad))
                known = (half(x, block.query, 3) for x in (total, delta))
                gradients = local_gradients(mine, keys, values, block.rule, next(known), theirs, next(known))
                half(dq, block.query, 3).add_(gradients[0])
                half(own, block.key, 2).add_(torch.cat(gradients[1:], -1))
            wait()
            arrive()
            here = coming
            dkv, arrive = pass_on(own.add_(dkv), group)  # with the keys that come next, or home
        arrive()
        dq = dq.flatten(1, 2).transpose(1, 2).to(q.dtype)
        dsinks = None if sinks is None else sink_gradients(sinks, total, delta)
        return dq, dkv.transpose(1, 2).to(q.dtype), None, None, None, dsinks


def grouped(x: Tensor, heads: int) -> Tensor:
    """[b, s, n, d] -> [b, m, g, s, d]: the query heads of each of m key/value heads together."""
    return x.transpose(1, 2).unflatten(1, (heads, -1))


def half(x: Tensor, which: int, dim: int) -> Tensor:
    """The first or the second chunk of a rank."""
    return x.chunk(2, dim)[which]


def pass_on(x: Tensor, group: ProcessGroup):
    """Begin to give x to the rank on the right -> (what will come from the left, a function that waits for it)."""
    rank, size = group.rank(), group.size()
    coming = torch.empty_like(x)
    return coming, swap([((rank + 1) % size, x)], [((rank - 1) % size, coming)], group)
