"""Activation recompute: keep the input of a block instead of what its forward pass made.

Paper: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from shardforge.nn.grouped import PRODUCT
from shardforge.nn.module import tagged

Recompute = Literal["none", "full", "selective"]

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._grouped_mm.default,
    PRODUCT,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""What "selective" keeps: results of matrix products and fused attention; the cheap rest is computed again."""


def apply(model: nn.Module, kind: Recompute) -> None:
    """Replace the forward of every block. Dropout and collectives repeat exactly: dropout has no generator state."""
    if kind == "none":
        return
    contexts = {} if kind == "full" else {"context_fn": _contexts}
    for block in tagged(model, "block"):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    keep, reuse = create_selective_checkpoint_contexts(list(KEPT))
    return _Only(keep), _Only(reuse)


class _Only(TorchDispatchMode):
    """Shows another mode nothing but what is kept. That one counts every operation and wants the same in both passes,
    but an FSDP unit inside a block, like its experts, gathers its weights at other times when the block runs again."""

    def __init__(self, mode: TorchDispatchMode):
        super().__init__()
        self.mode = mode

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in KEPT:
            return self.mode.__torch_dispatch__(op, types, args, kwargs)
        return op(*args, **(kwargs or {}))
