"""FSDP2 and HSDP: weights, gradients and optimizer states spread over the data ranks, one unit a block."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from shardforge.nn.module import tagged
from shardforge.parallel.mesh import Mesh


def apply(model: nn.Module, mesh: Mesh, mixed: MixedPrecisionPolicy, *, resharded: bool) -> None:
    """Shard each block and the rest. `resharded` frees gathered weights between forward and backward.

    Schedules that split the backward pass in two must keep the weights gathered: both halves need the same tensors.
    """
    for block in tagged(model, "block"):
        fully_shard(block, mesh=mesh.fsdp, mp_policy=mixed, reshard_after_forward=resharded)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=mixed, reshard_after_forward=False)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # the loss is already divided by the tokens of the whole batch
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
