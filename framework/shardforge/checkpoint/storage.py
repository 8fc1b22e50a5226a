"""torch DCP's storage as safetensors files and a JSON index: no pickle is written or read.

    step-00000200/
      rank-00000.safetensors    what rank 0 writes; rank-00000-1.safetensors and on when it is large
      rank-00001.safetensors
      index.json                tensor -> type, shape, chunks (offsets, sizes, file, key)

DCP plans: replicated chunks are written once, by the rank with the least to write, and any layout reads any other's
files. Failures do not travel through DCP, which would pickle a traceback; `error` keeps them for the caller, who asks
each rank after the call.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from shardforge.checkpoint import index, tensorfile
from shardforge.checkpoint.index import Chunk, Entry
from shardforge.checkpoint.tensorfile import TYPES, Part, Written
from shardforge.core.errors import CheckpointError

FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Place:
    """Where one chunk went."""

    key: str
    written: Written


@dataclass
class ShardWriter(StorageWriter):
    """Writes into an existing empty folder. After `dcp.save`: `error` of this rank; `files` on the coordinator."""

    folder: Path
    rank: int
    file_bytes: int = FILE_BYTES  # a file that has reached this many bytes is closed and the next begun
    error: Exception | None = None
    files: list[Written] = field(default_factory=list)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.error, self.files = None, []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        try:
            done.set_result(self._write(plan, planner))
        except Exception as cause:
            self.error = cause
            done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index.json, unless a rank brought nothing because it failed."""
        places = {result.index: result.storage_data for of_rank in results for result in of_rank}
        entries: dict[str, Entry] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f"{name} was planned as bytes"
            chunks = []
            for box in tensor.chunks:
                if box.sizes.numel() == 0:
                    continue
                place = places.get(MetadataIndex(name, box.offsets))
                if place is None:
                    return
                chunks.append(Chunk(tuple(box.offsets), tuple(box.sizes), place.written.file, place.key))
            dtype = tensorfile.type_name(tensor.properties.dtype)
            entries[name] = Entry(dtype, tuple(tensor.size), tuple(chunks))
        try:
            tensorfile.write_whole(self.folder / index.NAME, index.to_json(entries))
        except Exception as cause:
            self.error = cause
        self.files = sorted({place.written for place in places.values()}, key=lambda written: written.file)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _write(self, plan: SavePlan, planner: SavePlanner) -> list[WriteResult]:
        results: list[WriteResult] = []
        batch: list[tuple[WriteItem, Part]] = []
        number = size = 0
        items = [item for item in plan.items if item.tensor_data is None or item.tensor_data.chunk.sizes.numel()]
        for item in items:
            part = _part(item, planner)
            batch.append((item, part))
            size += part.bytes
            if size >= self.file_bytes or item is items[-1]:
                path = self.folder / index.file_name(self.rank, number)
                written = tensorfile.write_tensors(path, [each for _, each in batch])
                results += [WriteResult(done.index, each.bytes, Place(each.key, written)) for done, each in batch]
                batch, size, number = [], 0, number + 1
        return results


@dataclass
class ShardReader(StorageReader):
    """Reads a checkpoint folder into the tensors of a `dcp.load`, slice by slice. `error` is of this rank."""

    folder: Path
    entries: dict[str, Entry]
    error: Exception | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.error = None

    def read_metadata(self) -> Metadata:
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=TYPES[entry.dtype][0]),
                torch.Size(entry.shape),
                [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in entry.chunks],
            )
            for name, entry in self.entries.items()
        }
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        done: Future[None] = Future()
        try:
            self._read(plan, planner)
        except Exception as cause:
            self.error = cause
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> None:
        by_file: dict[str, list[tuple[ReadItem, Chunk]]] = defaultdict(list)
        for item in plan.items:
            chunks = self.entries[item.storage_index.fqn].chunks
            chunk = next(each for each in chunks if each.offsets == tuple(item.storage_index.offset or ()))
            by_file[chunk.file].append((item, chunk))
        for name, wanted in sorted(by_file.items()):
            with tensorfile.opened(self.folder / name) as file:
                for item, chunk in wanted:
                    entry = self.entries[item.storage_index.fqn]
                    numbers = stored(file, chunk, entry.dtype, self.folder / name)
                    box = zip(item.storage_offsets, item.lengths, strict=True)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(numbers[tuple(slice(start, start + length) for start, length in box)])
                    planner.commit_tensor(item, target)


def _part(item: WriteItem, planner: SavePlanner) -> Part:
    data = item.tensor_data
    if data is None:
        raise CheckpointError(f"{item.index.fqn} is not a tensor", "", "put it into `extra`, as plain JSON")
    dtype = tensorfile.type_name(data.properties.dtype)
    sizes, offsets = tuple(data.chunk.sizes), tuple(data.chunk.offsets)
    box = ",".join(f"{start}:{start + size}" for start, size in zip(offsets, sizes, strict=True))
    key = item.index.fqn if sizes == tuple(data.size) else f"{item.index.fqn}[{box}]"
    return Part(key, dtype, sizes, lambda: cast(torch.Tensor, planner.resolve_data(item)))


def stored(file: Any, chunk: Chunk, dtype: str, path: Path) -> torch.Tensor:
    """The chunk as a tensor over the mapped file; pages are read when numbers are."""
    header = file.get_slice(chunk.key)
    found = header.get_dtype(), tuple(header.get_shape())
    if found != (TYPES[dtype][1], chunk.sizes):
        raise CheckpointError(
            f"{chunk.key} is {found[0]}{list(found[1])} here and {TYPES[dtype][1]}{list(chunk.sizes)} in the index",
            path,
            index.DAMAGED,
        )
    return header[...] if chunk.sizes else file.get_tensor(chunk.key)
