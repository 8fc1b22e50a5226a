"""The same training step written by hand, for one layout each: plain tensors, plain collectives, no framework.

What the machinery of `parallel` and `engine` is measured against (bench/parallel.py). The arithmetic is ours (norms,
rotation, gate, fused loss), so that what differs is who moves the numbers and when. One kind of model: attention with
rotary positions, a gated or mixture-of-experts ffn, a head of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from shardforge.model.activations import CURVES
from shardforge.nn.batch import IGNORE, Batch
from shardforge.nn.fused import gated, rms_norm, rotate
from shardforge.nn.head import Head, VocabSplit
from shardforge.objective.cross_entropy import cross_entropy

Weights = dict[str, Tensor]
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Sizes:
    hidden: int
    heads: int
    width: int  # of a head
    inner: int
    vocab: int
    layers: int
    experts: int = 0  # 0: a gated ffn
    k: int = 2


class _Rows(Head):
    """What the fused loss asks of a head, around a plain tensor."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.__dict__["rows"] = weight

    def operand(self) -> Tensor:
        return self.rows


def tables(batch: Batch, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos, sin [b, s, 1, d/2] and the mask [b, 1, s, s] of numbers added to the scores."""
    pair = torch.arange(0, width, 2, dtype=torch.float64)
    angle = batch.positions[:, :, None, None] * 10000.0 ** (-pair / width)
    pos, doc = batch.positions, batch.documents
    seen = (doc[:, :, None] == doc[:, None, :]) & (pos[:, :, None] >= pos[:, None, :])
    mask = torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))[:, None]
    return angle.cos().float(), angle.sin().float(), mask


def attention(x: Tensor, w: Weights, at: str, sizes: Sizes, seq: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    cos, sin, mask = seq
    q, k, v = (F.linear(x, w[f"{at}.mixer.{name}.weight"]).unflatten(-1, (-1, sizes.width)) for name in "qkv")
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1 / math.sqrt(sizes.width))
    return F.linear(y.transpose(1, 2).flatten(2), w[f"{at}.mixer.out.weight"])


def glu(x: Tensor, w: Weights, at: str) -> Tensor:
    up = gated(F.linear(x, w[f"{at}.gate.weight"]), F.linear(x, w[f"{at}.up.weight"]), CURVES["silu"])
    return F.linear(up, w[f"{at}.down.weight"])


def same(x: Tensor) -> Tensor:
    return x


def block(
    x: Tensor,
    w: Weights,
    at: str,
    sizes: Sizes,
    seq: tuple[Tensor, Tensor, Tensor],
    ffn: Callable[[Tensor, Weights, str], Tensor] = glu,
    enter: Callable[[Tensor], Tensor] = same,
    leave: Callable[[Tensor], Tensor] = same,
) -> Tensor:
    norm = f"{at}.mixer_residual.norm.weight"
    x = x + leave(attention(enter(rms_norm(x, w[norm], EPS)), w, at, sizes, seq))
    y = rms_norm(x, w[f"{at}.ffn_residual.norm.weight"], EPS)
    return x + (ffn(y, w, f"{at}.ffn") if sizes.experts else leave(ffn(enter(y), w, f"{at}.ffn")))


EPS = 1e-6


def scored(batch: Batch, group: ProcessGroup | None) -> int:
    count = (batch.labels != IGNORE).sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return int(count)


def score(x: Tensor, rows: Tensor, labels: Tensor, split: VocabSplit) -> Tensor:
    """Cross entropy summed over the labels, of x [b, s, h] after the last norm."""
    return cross_entropy(x, _Rows(rows), labels, 0.0, split).total


class Gather(Function):
    """Positions of the group joined; backward adds up and keeps the own."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return joined(x, group)

    @staticmethod
    def backward(ctx, grad):
        return summed(grad, ctx.group), None


class Scatter(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return summed(x, group)

    @staticmethod
    def backward(ctx, grad):
        return joined(grad, ctx.group), None


def joined(x: Tensor, group: ProcessGroup) -> Tensor:
    front = x.transpose(0, 1).contiguous()
    out = front.new_empty(group.size() * front.shape[0], *front.shape[1:])
    _all_gather(out, front, group=group)
    return out.transpose(0, 1).contiguous()


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    front = x.transpose(0, 1).contiguous()
    out = front.new_empty(front.shape[0] // group.size(), *front.shape[1:])
    _reduce_scatter(out, front, group=group)
    return out.transpose(0, 1).contiguous()


class Exchange(Function):
    """Rows [t, h] to other ranks, sent[r] to rank r, received[r] from it."""

    @staticmethod
    def forward(ctx, x, sent, received, group):
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), x.shape[1])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        back = grad.new_empty(sum(ctx.sent), grad.shape[1])
        dist.all_to_all_single(back, grad.contiguous(), ctx.sent, ctx.received, group=ctx.group)
        return back, None, None, None


def experts(x: Tensor, w: Weights, at: str, sizes: Sizes, group: ProcessGroup) -> Tensor:
    """Top-k of a softmax, weights renormalised; tokens go to the rank of their expert and return. x [b, s, h]."""
    flat = x.flatten(0, 1)
    chance = F.linear(flat.float(), w[f"{at}.router.weight"].float()).softmax(-1)
    weight, chosen = chance.topk(sizes.k, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=sizes.experts)
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=group)
    here = sizes.experts // group.size()
    sent = counts.view(group.size(), here).sum(1).tolist()
    received = theirs.view(group.size(), here).sum(1).tolist()
    got = Exchange.apply(flat[order // sizes.k], sent, received, group)
    owner = torch.arange(here).repeat(group.size()).repeat_interleave(theirs)
    local = owner.argsort(stable=True)
    ends = torch.bincount(owner, minlength=here).cumsum(0).to(torch.int32)
    rows = got[local]
    gate, up, down = (w[f"{at}.experts.{name}"] for name in ("gate", "up", "down"))
    inner = gated(grouped(rows, gate, ends), grouped(rows, up, ends), CURVES["silu"])
    done = torch.empty_like(rows).index_copy(0, local, grouped(inner, down, ends))
    back = Exchange.apply(done, received, sent, group)
    y = torch.zeros_like(flat).index_add(0, order // sizes.k, back * weight.flatten()[order, None].to(x.dtype))
    return y.view_as(x)


def grouped(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w, offs=ends)


@torch.no_grad()
def update(weights: list[Tensor], optimizer: torch.optim.Optimizer, once: Callable[[int], float]) -> None:
    """Clip to norm 1 over all ranks and step; weight n counts once(n) on this rank."""
    squares = torch.stack(torch._foreach_norm([w.grad for w in weights])).square()
    total = (squares * torch.tensor([once(n) for n in range(len(weights))])).sum()
    dist.all_reduce(total)
    scale = (1.0 / (total.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([w.grad for w in weights], scale)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
