"""Files of torch.distributed's checkpoints, written by one process at a time and one tensor after another.

Reference: torch.distributed.checkpoint of torch 2.13, FileSystemReader and its `.metadata`. Pieces of a tensor may lie
in any file, and several names may share one piece.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.convert.hashed import Hashed


def write_pieces(path: Path, parts: Sequence[Part], boxes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Write `parts`, each in the shape of its box; "pieces" of the result says where each lies, (offset, length)."""
    pieces: list[tuple[int, int]] = []
    with Hashed(path) as hashed:
        for part, shape in zip(parts, boxes, strict=True):
            tensor = part.read().detach().reshape(shape)
            if tensor.untyped_storage().nbytes() != part.bytes or not tensor.is_contiguous():
                tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes the whole of a storage
            pieces.append(hashed.save(tensor))
            del tensor  # before the next one is made
    return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest(), "pieces": pieces}


@dataclass
class Index:
    """What `.metadata` says: add all pieces and objects, then `write` it."""

    tensors: dict[str, tuple[str, torch.Size, list[ChunkStorageMetadata]]] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)

    def add(
        self,
        key: str,
        dtype: str,
        box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
        place: tuple[str, int, int],
    ) -> None:
        """A piece of the tensor `key`: its offsets and sizes and the whole shape, and its file, offset and length."""
        offsets, sizes, whole = (torch.Size(each) for each in box)
        chunks = self.tensors.setdefault(key, (dtype, whole, []))[2]
        self.places[MetadataIndex(key, offsets, len(chunks))] = _StorageInfo(*place)
        chunks.append(ChunkStorageMetadata(offsets, sizes))

    def add_object(self, key: str, place: tuple[str, int, int]) -> None:
        """What torch.save wrote for `key`."""
        self.objects.append(key)
        self.places[MetadataIndex(key)] = _StorageInfo(*place)

    def write(self, path: Path, save: str) -> None:
        """`save` is the name of this save, by which others know it again."""
        entries: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype=TYPES[dtype][0]), whole, chunks)
            for key, (dtype, whole, chunks) in self.tensors.items()
        }
        entries |= {key: BytesStorageMetadata() for key in self.objects}
        meta = StorageMeta(checkpoint_id=path.parent.name, save_id=save)
        tensorfile.write_whole(path, pickle.dumps(Metadata(entries, None, self.places, meta)))


def saved(found: Any) -> bytes:
    """What torch.save makes of it."""
    stream = io.BytesIO()
    torch.save(found, stream)
    return stream.getvalue()


def fingerprint(records: Mapping[str, Mapping[str, Any]]) -> str:
    """A name for the save of these files."""
    told = repr(sorted((name, said["sha256"]) for name, said in records.items()))
    return hashlib.sha256(told.encode()).hexdigest()[:32]
