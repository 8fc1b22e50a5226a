"""Stand-ins of a dry run: a process group without peers, weights without storage, attention that only keeps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function

from shardforge.core.errors import EngineError
from shardforge.model.attention import AttentionCore
from shardforge.nn import fused
from shardforge.nn.sequence import Mask, Sequence
from shardforge.objective import cross_entropy
from shardforge.parallel.attention import local


@contextmanager
def world(ranks: int, rank: int) -> Iterator[FakeTensorMode]:
    """A job of `ranks` processes as seen by one of them; its collectives return at once. Yields the mode for tensors.

    Meshes must be made outside of the mode: they compute with numbers. Loops over pieces that fit the cache of a CPU
    take pieces of a GPU.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise EngineError("a dry run needs a process without a process group", "--dry-run", "run it in one of its own")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    pieces, chunk, tile = fused.CACHED, cross_entropy.CHUNK_BYTES["cpu"], local.TILE_BYTES["cpu"]
    fused.CACHED, cross_entropy.CHUNK_BYTES["cpu"] = 1 << 62, cross_entropy.CHUNK_BYTES["cuda"]
    local.TILE_BYTES["cpu"] = local.TILE_BYTES["cuda"]
    gc.freeze()  # what is here stays; looking for garbage looks at the rest
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        gc.unfreeze()
        fused.CACHED, cross_entropy.CHUNK_BYTES["cpu"], local.TILE_BYTES["cpu"] = pieces, chunk, tile
        dist.destroy_process_group()
        forget_meshes()


def forget_meshes() -> None:
    """Drop what torch keeps of operations on DTensors: it names groups of a world that is gone, and a later mesh of
    the same ranks, also in a forked process, would be taken for one of that world."""
    from torch.distributed.tensor import debug

    for clear in ("_clear_sharding_prop_cache", "_clear_fast_path_sharding_prop_cache"):
        getattr(debug, clear, lambda: None)()


def give_storage(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the weights of a model on meta by fake ones of the CPU, which have a size and no memory."""
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.is_meta and id(weight) not in made:
                    made[id(weight)] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="cpu"))
                setattr(module, name, made.get(id(weight), weight))
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


@dataclass(frozen=True, kw_only=True)
class KeepsConfig:
    """For `model.core` where it is left to the machine."""

    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> Keeps:
        return Keeps(mask, scale, sinks, softcap)


class Keeps(AttentionCore):
    """Keeps for the backward pass what fused attention keeps, and computes nothing."""

    def prepare(self, seq: Sequence) -> None:
        """No mask is needed."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        return _Keep.apply(q, k, v, sinks)


class _Keep(Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks):
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        sums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)  # log of each query's normalizer
        ctx.save_for_backward(q, k, v, out, sums, sinks)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _, sinks = ctx.saved_tensors
        return *map(torch.empty_like, (q, k, v)), None if sinks is None else torch.empty_like(sinks)
