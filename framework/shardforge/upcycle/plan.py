"""Everything about an upcycling that is known before a weight is read: files, tensors, shapes, types, places.

Files follow the layers: job 0 is what stands outside of the blocks, job i + 1 is block i. So the files, byte for byte,
do not depend on how many processes write them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from shardforge.checkpoint import index
from shardforge.checkpoint.index import Chunk, Entry
from shardforge.checkpoint.journal import Journal
from shardforge.checkpoint.storage import FILE_BYTES
from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.families.fingerprint import fingerprint
from shardforge.families.source import Source
from shardforge.recipe.provenance import plain
from shardforge.upcycle.options import Options
from shardforge.upcycle.target import Layer, Target

FORMAT = 1
NAMES = {"bf16": "bfloat16", "fp32": "float32"}
Opener = Callable[[Path], Source]


@dataclass(frozen=True)
class Item:
    """A box of one tensor, written as one piece: experts come one by one, all else whole."""

    weight: str  # name in the model
    kind: str  # "" for the weight itself, or what the optimizer keeps for it
    expert: int | None
    dtype: str
    shape: tuple[int, ...]  # of the whole tensor

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return f"optim.{self.weight}.{self.kind}" if self.kind else f"model.{self.weight}"

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.expert or 0, *[0] * (len(self.shape) - 1)) if self.shape else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape if self.expert is None else (1, *self.shape[1:])

    @property
    def key(self) -> str:
        if self.expert is None:
            return self.name
        box = ",".join(f"{start}:{start + size}" for start, size in zip(self.offsets, self.sizes, strict=True))
        return f"{self.name}[{box}]"

    @property
    def bytes(self) -> int:
        return prod(self.sizes) * TYPES[self.dtype][0].itemsize


@dataclass(frozen=True)
class Plan:
    """Plain data that workers get. `opener` opens the source in each of them."""

    source: Path
    opener: Opener
    folder: Path  # the attempt
    journal: Journal
    options: Options
    target: Target
    types: dict[str, str]  # weight -> type in the result
    moments: dict[str, str]  # kind of what the optimizer keeps -> type
    counts: frozenset[str]  # those of them that are one number for a weight
    source_weights: frozenset[str]

    @property
    def jobs(self) -> range:
        """Numbers of the pieces of work."""
        return range(max((_job(name) for name in self.target.table), default=0) + 1)

    def layer(self, job: int) -> Layer | None:
        return next((layer for layer in self.target.layers if layer.number == job - 1), None)

    def items(self, job: int) -> list[Item]:
        """What a job writes, in order."""
        found: list[Item] = []
        for kind in ("", *self.moments):
            for name in self._names(job):
                if kind and name in self.target.buffers:
                    continue
                shape = () if kind in self.counts else tuple(self.target.table[name]["shape"])
                dtype = self.moments[kind] if kind else self.types[name]
                experts: Sequence[int | None] = range(shape[0]) if shape and is_expert(name) else (None,)
                found += [Item(name, kind, expert, dtype, shape) for expert in experts]
        return found

    def files(self, job: int) -> Iterator[tuple[str, list[Item]]]:
        """Names of the files of a job and what each holds; one that has reached FILE_BYTES is the last but one."""
        part, size, batch = 0, 0, []
        items = self.items(job)
        for item in items:
            batch.append(item)
            size += item.bytes
            if size >= FILE_BYTES or item is items[-1]:
                yield index.file_name(job, part), batch
                part, size, batch = part + 1, 0, []

    def bytes(self, job: int) -> int:
        return sum(item.bytes for item in self.items(job))

    def entries(self) -> dict[str, Entry]:
        """The index of the result."""
        chunks: dict[str, list[Chunk]] = {}
        whole: dict[str, Item] = {}
        for job in self.jobs:
            for file, items in self.files(job):
                for item in items:
                    whole[item.name] = item
                    chunks.setdefault(item.name, []).append(Chunk(item.offsets, item.sizes, file, item.key))
        return {name: Entry(item.dtype, item.shape, tuple(chunks[name])) for name, item in whole.items()}

    def described(self) -> dict[str, Any]:
        """`checkpoint.state.table` with the types of the result."""
        return {name: {**row, "dtype": self.types[name]} for name, row in self.target.table.items()}

    def _names(self, job: int) -> list[str]:
        """Weights of a job, those of the experts last and matrix by matrix, each before its bias."""
        names = [name for name in self.target.table if _job(name) == job]
        order = {name: place for place, name in enumerate(names)}
        return sorted(names, key=lambda name: (is_expert(name), _rank(name) if is_expert(name) else order[name]))


def identity(source: Source, options: Options) -> dict[str, Any]:
    """What the bytes of the result depend on, as plain data."""
    return {"format": FORMAT, "source": fingerprint(source), "options": plain(options)}


def digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    source: Source, opener: Opener, options: Options, target: Target, folder: Path, work: Path, path: Path
) -> Plan:
    kinds = (*source.moments, *source.counts) if options.moments == "carry" else ()
    smallest = min(source.names, key=lambda name: (prod(source.names[name].shape), name))
    moments = {kind: type_name(source.read_moment(kind, smallest).dtype) for kind in kinds}
    types = {name: _type(name, source, options, target) for name in target.table}
    counts = frozenset(kinds).intersection(source.counts)
    return Plan(
        path, opener, folder, Journal(work, folder), options, target, types, moments, counts, frozenset(source.names)
    )


def is_expert(name: str) -> bool:
    """Whether a weight is one of `experts` side by side."""
    return ".ffn.experts." in name


def matrix_of(name: str) -> str:
    """ "blocks.3.ffn.experts.gate_bias" -> "gate_bias"."""
    return name.rpartition(".")[2]


def _rank(name: str) -> int:
    return ("gate", "gate_bias", "up", "up_bias", "down", "down_bias").index(matrix_of(name))


def _job(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) + 1 if parts[0] == "blocks" else 0


def _type(name: str, source: Source, options: Options, target: Target) -> str:
    if name in target.buffers and name not in source.names:
        return str(target.table[name]["dtype"])
    if options.dtype != "source" and name not in target.buffers:
        return NAMES[options.dtype]
    if name in source.names:
        return source.names[name].dtype
    return source.names[f"{name.partition('.ffn.')[0]}.ffn.up.weight"].dtype
