"""Copies of the training state on the CPU, in buffers that live from one save to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.core.errors import CheckpointError


class Staging:
    """Host memory for one copy of this rank's pieces; a copy is valid until the next one is taken."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's piece of each tensor, on the CPU."""
        kept, self._buffers = self._buffers, {}
        on_device = False
        for name, tensor in tensors.items():
            piece = _piece(tensor)
            buffer = kept.get(name)
            if buffer is None or buffer.shape != piece.shape or buffer.dtype != piece.dtype:
                buffer = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=piece.is_cuda)
            buffer.copy_(piece, non_blocking=piece.is_cuda)
            on_device |= piece.is_cuda
            self._buffers[name] = buffer
        if on_device:
            torch.cuda.synchronize()
        return dict(self._buffers)


def live(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's piece of each tensor, where it is: for a save that training waits for."""
    return {name: _piece(tensor) for name, tensor in tensors.items()}


def _piece(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


class StagedPlanner(DefaultSavePlanner):
    """Plans from the live tensors, which know their mesh and placements, and hands out the staged numbers."""

    def __init__(self, pieces: Mapping[str, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn]


def check(tensors: Mapping[str, Tensor], extra: dict) -> None:
    """Raise CheckpointError for what a checkpoint cannot hold."""
    for name, tensor in tensors.items():
        kind = type_name(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        if kind not in TYPES:
            raise CheckpointError(f"a checkpoint cannot hold {kind}", name, f"use one of {', '.join(TYPES)}")
    try:
        json.dumps(extra)
    except (TypeError, ValueError) as cause:
        raise CheckpointError(f"not plain JSON: {cause}", "extra", "numbers, text, lists and dictionaries") from cause


def whole_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of all tensors over all ranks, each number once."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())
