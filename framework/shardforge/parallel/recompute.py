"""Activation recompute: keep the input of a block instead of what its forward pass made.

Paper: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from shardforge.nn.module import tagged

Recompute = Literal["none", "full", "selective"]

_aten = torch.ops.aten
KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
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
    contexts = {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    for block in tagged(model, "block"):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts)


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
