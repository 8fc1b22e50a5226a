"""torch.compile, one block at a time: equal blocks share one compiled graph, and names do not change."""

from __future__ import annotations

import torch
from torch import nn

from shardforge.nn.module import tagged


def apply(model: nn.Module, compiled: bool) -> None:
    """Compile each block in place. The compiled code runs inside FSDP's hooks and outside the slots' collectives."""
    for block in tagged(model, "block") if compiled else ():
        for module in block.modules():
            for name in ("note", "used"):  # by its own number: each layer would need a graph, and torch makes eight
                if hasattr(module, name):
                    setattr(module, name, torch.compiler.disable(getattr(module, name)))
        block.forward = torch.compile(block.forward)
