"""What waits in the memory of the CPU while the device does not need it: optimizer and weights, or activations.

Paper: Ren et al. 2021, "ZeRO-Offload", arXiv:2101.06840; Rhu et al. 2016, "vDNN", arXiv:1602.08124.

"optimizer": the pieces of weights, their gradients and the optimizer's states live in the memory of the CPU, and the
optimizer steps there (FSDP2's policy, see fully_shard). A unit's piece is copied to the device when it is gathered, the
sum of its gradients back. Clip and checkpoints then see tensors of the CPU, which gloo reduces.

"activations": what a block keeps for its backward pass. At most those of two blocks are on the device.

    forward      block 0 | block 1 | block 2         backward   block 2 | block 1 | block 0
    copied out     0         1         2             copied in    1         0
    freed                    0         1

With recompute: full a block keeps its input only. Weights stay where they are, as do the tables that all layers share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from shardforge.nn.module import Module, tagged
from shardforge.parallel.shelf import Lane, Shelf, lane_of

Offload = Literal["optimizer", "activations"]


def materialise(model: nn.Module, device: torch.device, offload: Collection[Offload]) -> None:
    """Memory for a model on meta: on `device`, but with "optimizer" the weights on the CPU. Uninitialised."""
    if "optimizer" not in offload:
        model.to_empty(device=device)
        return
    model.to_empty(device="cpu")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def apply(model: nn.Module, offload: Collection[Offload], device_type: str) -> None:
    """With "activations", replace the forward of every block. Numbers do not change; on a CPU nothing is copied."""
    if "activations" not in offload:
        return
    lane = lane_of(device_type)
    for index, block in enumerate(tagged(model, "block")):
        block.forward = partial(_forward, lane, block, index == 0, block.forward)
        for experts in tagged(block, "experts"):  # a unit of its own, gathered after the block has begun
            experts.register_forward_pre_hook(partial(_spare, lane))


def _forward(lane: Lane, block: Module, first: bool, forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, *rest)
    shelf = Shelf(lane, None if first else lane.latest)
    shelf.spare(block.parameters())
    shelf.spare(tensors(rest))
    lane.filling = shelf
    try:
        with saved_tensors_hooks(shelf.pack, shelf.unpack):
            return forward(x, *rest)
    finally:
        lane.filling = None
        shelf.close()


@torch.compiler.disable
def _spare(lane: Lane, module: nn.Module, args: tuple) -> None:
    if lane.filling is not None:
        lane.filling.spare(module.parameters())


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested dataclasses, mappings and sequences."""
    if isinstance(value, Tensor):
        yield value._local_tensor if isinstance(value, DTensor) else value
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
