"""The one list of passes over a finished single-device model, in the order in which they must run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from shardforge.parallel import compile as compile_pass
from shardforge.parallel import fully_shard, recompute, tensor
from shardforge.parallel.mesh import Mesh

if TYPE_CHECKING:
    from shardforge.engine.kinds.native import NativeConfig


def apply(model: nn.Module, mesh: Mesh, mixed: MixedPrecisionPolicy, cfg: NativeConfig) -> None:
    """Make a model, or one stage of it, this rank's part of the layout."""
    tensor.apply(model, mesh)  # first: it decides what each rank's weights are
    compile_pass.apply(model, cfg.compiled)  # the forward of a block alone: hooks of the next two stay outside
    recompute.apply(model, cfg.recompute)  # around what is compiled, inside FSDP: weights are gathered before it
    if mesh.layout.world_size > 1 or mixed.param_dtype is not None:
        fully_shard.apply(model, mesh, mixed, resharded=cfg.zero == 3)  # last: it wraps what the others made
