"""FSDP2 and HSDP as ZeRO 1, 2 and 3: state spread over data ranks; a unit is a block, its experts, or the rest.

Paper: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054, section 5; Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277.

Bytes on a rank. W: numbers in its part of the model (after pp, tp, ep, etp), U: in the largest unit, n: ranks that
share one copy (dp_shard x cp; for experts dp_shard x cp x tp / (ep x etp)); a, s, c, r: bytes of a stored weight, of
its optimizer states, of a weight in compute, of a gradient in the sum.

    zero   weights at rest   optimizer states   gathered weights   gradients
    3      a W / n           s W / n            2 c U              a W / n + r U
    2      a W / n           s W / n            c W                a W / n + r U
    1      a W / n           s W / n            c W                a W / n + r W

Collectives of a step with k micro-batches, for each block: 3 gathers its weights 2 k times and sums its gradients k
times, 2 gathers once and sums k times, 1 gathers once and sums once; with k = 1, 1 is 2. At every level the unit of the
rest (embedding, head) stays gathered between forward and backward, and replicas are summed once a step. The schedules
of a pipeline sum once a step at every level: there the gradients of 2 and 3 take r W as those of 1 do.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shardforge.nn.module import tagged
from shardforge.parallel.mesh import Mesh


def apply(model: nn.Module, mesh: Mesh, mixed: MixedPrecisionPolicy, *, zero: int, offloaded: bool = False) -> None:
    """Shard the blocks of a model, or of one stage of it, and the rest. The caller says `sync` before each micro-batch.

    Schedules that split the backward pass in two must keep the weights gathered: both halves need the same tensors.
    `offloaded`: the pieces, their gradients and the optimizer live in the memory of the CPU.
    """
    rest = CPUOffloadPolicy(pin_memory=mesh.whole.device_type == "cuda") if offloaded else OffloadPolicy()
    shard = partial(fully_shard, mp_policy=mixed, offload_policy=rest)
    for experts in tagged(model, "experts"):
        place = partial(_split, mesh.expert_fsdp.shape[-1])
        shard(experts, mesh=mesh.expert_fsdp, shard_placement_fn=place, reshard_after_forward=zero == 3)
    for block in tagged(model, "block"):
        shard(block, mesh=mesh.fsdp, reshard_after_forward=zero == 3)
    shard(model, mesh=mesh.fsdp, reshard_after_forward=False)
    for unit in units(model):
        unit.set_gradient_divide_factor(1.0)  # the loss is already divided by the tokens of the whole batch
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum


def _split(ranks: int, weight: Tensor) -> Shard:
    """The first dimension of a rank's own experts that `ranks` divide: whole experts, else parts of each of them."""
    piece = weight._local_tensor if isinstance(weight, DTensor) else weight
    return Shard(next((dim for dim, size in enumerate(piece.shape) if size % ranks == 0), 0))


def sync(model: nn.Module, zero: int, *, last: bool) -> None:
    """Before a micro-batch: what its backward pass sums over ranks and frees. `last`: it completes the step."""
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last or zero > 1)
    model.set_requires_all_reduce(last)
    model.set_reshard_after_backward(last or zero == 3)
    model.set_is_last_backward(last)


def free(model: nn.Module) -> None:
    """After a forward pass without a backward pass: keep the pieces only, as after a step."""
    for unit in units(model):
        unit.reshard()


def units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
