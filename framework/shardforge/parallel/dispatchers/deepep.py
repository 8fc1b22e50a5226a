"""DeepEP's kernels, which send tokens to ranks over NVLink and RDMA from inside the GPU.

Paper: DeepSeek-AI 2025, "DeepEP", github.com/deepseek-ai/DeepEP, the normal kernels (not the low-latency ones).
Cost: h numbers out and back for each pair of a token and a rank, in bfloat16; over nodes also at most one copy a node.
Limits: needs the package deep_ep, CUDA and bfloat16. Written against its documented interface and tested against a
    stand-in on gloo; never run on the real kernels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

from shardforge.core.errors import LayoutError
from shardforge.core.optional import require
from shardforge.nn.dispatch import Local, Run


@dataclass(frozen=True)
class DeepEP:
    """Rank r of the group of `buffer` has the experts [r * n, (r + 1) * n), where n = `experts` / ranks."""

    buffer: Any
    experts: int

    def __call__(self, x: Tensor, expert: Tensor, weight: Tensor, run: Run) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise LayoutError(
                f"deepep sends bfloat16, not {str(x.dtype).removeprefix('torch.')}",
                "engine.dispatch",
                "dispatch: exchange, or precision.compute: bf16",
            )
        handle: list[Any] = []
        rows, chosen, weights = _Send.apply(x, expert, weight.float(), self.buffer, self.experts, handle)
        here = Local(self.experts // self.buffer.group_size, dropless=False)
        return _Return.apply(here(rows, chosen, weights, run), self.buffer, handle[0])


@functools.cache
def buffer(group: ProcessGroup, hidden: int) -> Any:
    """The buffer of a group for tokens of `hidden` bfloat16 numbers, one for all layers; made at the first call."""
    package = require(
        "deep_ep",
        for_="engine.dispatch: deepep",
        field="engine.dispatch",
        fix="build it from github.com/deepseek-ai/DeepEP for your CUDA, or dispatch: exchange",
    )
    made = package.Buffer
    ranks, row = group.size(), 2 * hidden
    configs = (made.get_dispatch_config(ranks), made.get_combine_config(ranks))
    nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
    rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
    return made(group, nvlink, rdma)


class _Send(Function):
    """x [t, h], expert [t, k], weight [t, k] -> the same of the tokens that this rank's experts need, numbered here."""

    @staticmethod
    def forward(ctx, x, expert, weight, buffer, experts, handle):
        per_rank, per_node, per_expert, needed, _ = buffer.get_dispatch_layout(expert, experts)
        rows, chosen, weights, _, ctx.handle, _ = buffer.dispatch(
            x.contiguous(),
            topk_idx=expert,
            topk_weights=weight.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=needed,
            num_tokens_per_expert=per_expert,
        )
        ctx.buffer = buffer
        handle.append(ctx.handle)
        ctx.mark_non_differentiable(chosen)
        return rows, chosen, weights

    @staticmethod
    def backward(ctx, rows, _, weights):
        dx, dweight, _ = ctx.buffer.combine(rows.contiguous(), ctx.handle, topk_weights=weights.contiguous())
        return dx, None, dweight, None, None, None


class _Return(Function):
    """What the experts made [m, h] -> the sums at the tokens they came from [t, h]."""

    @staticmethod
    def forward(ctx, y, buffer, handle):
        ctx.buffer, ctx.handle = buffer, handle
        return buffer.combine(y.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx, grad):
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.handle)[0], None, None
