"""Windowed attention: only the last keys and values of the chunk before each chunk are sent.

Paper: none; the halo exchange of stencil codes. Windows: Beltagy, Peters, Cohan 2020, "Longformer", arXiv:2004.05150.
Changes: in the zigzag order the chunk before a rank's first one is its left neighbour's first, and the chunk before its
    second one is its right neighbour's second (the last rank has it itself).
Cost: twice window - 1 keys and values a layer and rank, whatever the length and cp.
Limits: windows of at most one chunk + 1, length / (2 cp) + 1 tokens; longer ones are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from shardforge.nn.module import Module
from shardforge.parallel.attention.exchange import swap
from shardforge.parallel.attention.gather import Gather


@dataclass(frozen=True)
class Halo(Gather):
    traced: ClassVar[bool] = False

    def keys(self, core: Module, kv: Tensor) -> list[Tensor]:
        reach = core.mask.window - 1
        if reach > kv.shape[1] // 2:
            return super().keys(core, kv)
        before = tails(kv, self.group, reach) if reach else (kv[:, :0], kv[:, :0])
        return [torch.cat(pair, 1) for pair in zip(before, kv.chunk(2, 1), strict=True)]

    @staticmethod
    def describe(core: Module, cp: int, length: int) -> str:
        size, window = length // (2 * cp), core.mask.window
        if window - 1 > size:
            return f"{Gather.describe(core, cp, length)}, because a window of {window} is longer than a chunk of {size}"
        return f"halo: {window - 1} tokens from before each chunk of {size}"


def tails(kv: Tensor, group: ProcessGroup, reach: int) -> tuple[Tensor, Tensor]:
    """The last `reach` tokens of the chunks before the two chunks of kv [b, s, ...]; none before chunk 0."""
    return _Tails.apply(kv, group, reach)


class _Tails(Function):
    @staticmethod
    def forward(ctx, kv, group, reach):
        ctx.group, ctx.shape = group, kv.shape
        rank, last = group.rank(), group.size() - 1
        mine = [chunk[:, -reach:].contiguous() for chunk in kv.chunk(2, 1)]
        got = [torch.empty_like(tail) for tail in mine]
        right = [(rank + 1, 0, 1)] if rank < last else []  # neighbour, which tail it needs, which chunk its tail serves
        left = [(rank - 1, 1, 0)] if rank > 0 else []
        swap(
            [(peer, mine[give]) for peer, give, _ in left + right],
            [(peer, got[take]) for peer, _, take in left + right],
            group,
        )()
        if rank == last:
            got[1] = mine[0].clone()
        if rank == 0:
            got[0] = kv.new_empty(kv.shape[0], 0, *kv.shape[2:])
        return tuple(got)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        group, reach = ctx.group, grads[1].shape[1]
        rank, last = group.rank(), group.size() - 1
        grads = [grad.contiguous() for grad in grads]
        back = [torch.zeros_like(grads[1]) for _ in grads]  # of the tails of the two chunks here
        right = [(rank + 1, 0, 1)] if rank < last else []
        left = [(rank - 1, 1, 0)] if rank > 0 else []
        swap(
            [(peer, grads[take]) for peer, _, take in left + right],
            [(peer, back[give]) for peer, give, _ in left + right],
            group,
        )()
        if rank == last:
            back[0] += grads[1]
        grad = grads[1].new_zeros(ctx.shape)
        for chunk, tail in zip(grad.chunk(2, 1), back, strict=True):
            chunk[:, -reach:] = tail
        return grad, None, None
