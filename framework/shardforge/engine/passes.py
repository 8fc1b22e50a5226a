"""The one list of passes over a finished single-device model, in the order in which they must run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardforge.parallel import compile as compile_pass
from shardforge.parallel import context, expert, fully_shard, offload, recompute, tensor
from shardforge.parallel.mesh import Mesh

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig


def apply(model: nn.Module, mesh: Mesh, mixed: MixedPrecisionPolicy, cfg: NativeConfig) -> None:
    """Make a model, or one stage of it, this rank's part of the layout."""
    expert.apply(model, mesh, cfg.dispatch)  # these two first: they decide what each rank's weights are
    tensor.apply(model, mesh, overlap=cfg.overlap)
    context.apply(model, mesh, cfg.context, compiled=cfg.compiled)  # after it: a core's heads are those of this tp rank
    compile_pass.apply(model, cfg.compiled)  # the forward of a block alone: hooks of the next two stay outside
    recompute.apply(model, cfg.recompute)  # around what is compiled, inside FSDP: weights are gathered before it
    offload.apply(model, cfg.offload, mesh.whole.device_type)  # around recompute: then only a block's input travels
    on_cpu = "optimizer" in cfg.offload
    if mesh.layout.stage_size > 1 or mixed.param_dtype is not None or on_cpu:
        fully_shard.apply(model, mesh, mixed, zero=cfg.zero, offloaded=on_cpu)  # last: it wraps what the others made
