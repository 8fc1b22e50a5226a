"""The interface of the package deep_ep over gloo: the same calls, arguments and results, none of its kernels."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor


def _sent(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class Buffer:
    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int):
        assert num_nvl_bytes > 0 and num_rdma_bytes == 0
        self.group, self.group_size = group, group.size()

    @staticmethod
    def get_dispatch_config(ranks: int) -> SimpleNamespace:
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda row, ranks: row * ranks, get_rdma_buffer_size_hint=lambda row, ranks: 0
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int):
        owner = topk_idx.div(num_experts // self.group_size, rounding_mode="floor")
        needed = (owner[:, :, None] == torch.arange(self.group_size)).any(1)
        per_expert = torch.stack([(topk_idx == each).sum() for each in range(num_experts)])
        return needed.sum(0).int(), None, per_expert.int(), needed, None

    def dispatch(
        self,
        x: Tensor,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
    ):
        assert x.dtype == torch.bfloat16
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            token, sent, received, _ = handle
            return _sent(x[token], sent, received, self.group), None, None, None, None, None
        assert topk_weights.dtype == torch.float32
        token = is_token_in_rank.T.nonzero()[:, 1]
        sent = num_tokens_per_rank.tolist()
        received = _sent(num_tokens_per_rank, [1] * self.group_size, [1] * self.group_size, self.group).tolist()
        n = len(num_tokens_per_expert) // self.group_size
        index = _sent(topk_idx[token], sent, received, self.group) - self.group.rank() * n
        index = index.where((index >= 0) & (index < n), -1)
        weights = _sent(topk_weights[token], sent, received, self.group) * (index >= 0)
        listed = [int((index == each).sum()) for each in range(n)]
        handle = (token, sent, received, len(x))
        return _sent(x[token], sent, received, self.group), index, weights, listed, handle, None

    def combine(self, x: Tensor, handle: tuple, topk_weights: Tensor | None = None):
        assert x.dtype == torch.bfloat16
        token, sent, received, tokens = handle

        def back(each: Tensor) -> Tensor:
            rows = _sent(each, received, sent, self.group)
            return rows.new_zeros(tokens, *each.shape[1:]).index_add(0, token, rows)

        return back(x), None if topk_weights is None else back(topk_weights), None
