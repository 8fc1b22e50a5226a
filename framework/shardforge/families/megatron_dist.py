"""The tensors of a torch_dist checkpoint of Megatron, read through torch.distributed's index without running it.

iter_0001000/.metadata, __0_0.distcp ..., common.pt    whole tensors in pieces, layers and experts stacked
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.core.errors import CheckpointError
from shardforge.families.megatron_names import FC1, OURS, Spot, common_name
from shardforge.families.pickles import distrusted, read_pickle, read_saved, read_stream
from shardforge.families.source import Info

METADATA, COMMON, INSIDE = ".metadata", "common.pt", "common_state/shard_0_1"
GATES = ("swiglu", "quick_geglu")
WRAPPED = re.compile(r"(?:module\.|model\.)*(.*)")
STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.*)")
STACKED = re.compile(r"decoder\.layers\.(?!\d)(.*)")
EXPERTS = re.compile(r"(.*\.experts\.experts)\.(?!\d)(.*)")
MASTERS = ("param", "fp32_param")
"""Names of the weights as the optimizer keeps them, in single precision."""
MOST = 1_000_000
"""Tensors of one checkpoint, counted layer by layer and expert by expert; the largest models have a third of that."""
UNLIKE = "the index is not one that torch.distributed writes"


class DistFolder:
    """See `families.linked.Tensors`; a tensor by itself has the name that `megatron_names` gives it.

    `common` is what is kept beside the tensors, {} where nothing is; it is read unless it is given. `kinds` are what
    the optimizer keeps: kind -> names. Where it keeps a weight in another type, that is the weight that is read.
    """

    def __init__(self, path: Path, common: Mapping[str, Any] | None = None):
        self.path = path
        read: Any = read_pickle(path / METADATA)
        if not isinstance(read, Metadata) or not isinstance(read.storage_data, Mapping):
            raise CheckpointError("this is no torch.distributed checkpoint", path / METADATA, "copy it again")
        with distrusted(path / METADATA, UNLIKE):
            self._entries: Mapping[str, Any] = dict(read.state_dict_metadata)
            self._places = {
                (each.fqn, None if each.offset is None else tuple(each.offset)): place
                for each, place in read.storage_data.items()
                if isinstance(each, MetadataIndex)
            }
            self.saved = getattr(read.storage_meta, "save_id", None)
            self.random = any(key.startswith("rng_state") for key in self._entries)
        self.common = self._common() if common is None else common
        self.gated = any(getattr(self.common.get("args"), each, False) for each in GATES)
        self._claimed = 0
        self.names: dict[str, Info] = {}
        self.kinds: dict[str, dict[str, Info]] = {}
        self._spots: dict[tuple[str, str], Spot] = {}
        self._grids: dict[tuple[str, int], dict[tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]] = {}
        self._last: tuple[tuple[str, tuple[int, ...]], Tensor] | None = None
        with distrusted(path / METADATA, UNLIKE):
            for key, entry in self._entries.items():
                if isinstance(entry, TensorStorageMetadata):
                    self._enter(key, tuple(entry.size), type_name(entry.properties.dtype))
        self._masters()

    def read(self, name: str) -> Tensor:
        return self.read_kind("", name)

    def read_kind(self, kind: str, name: str) -> Tensor:
        """What the optimizer keeps for a tensor; "" for the tensor itself."""
        with distrusted(self.path):
            return self._read(kind, name)

    def _read(self, kind: str, name: str) -> Tensor:
        spot = self._spots[kind, name]
        info = (self.kinds[kind] if kind else self.names)[name]
        offsets, sizes, _ = spot.box(info.shape)
        pieces = [
            (start, length)
            for start, length in self._near(spot.key, offsets, len(spot.lead))
            if all(a < b + n and b < a + m for a, m, b, n in zip(offsets, sizes, start, length, strict=True))
        ]
        if pieces == [(offsets, sizes)]:
            return self._chunk(spot.key, offsets, sizes).reshape(info.shape)
        cuts = [_shared(offsets, sizes, *piece) for piece in pieces]
        if left := prod(sizes) - sum(prod(high - low for low, high in cut) for cut in cuts):
            raise CheckpointError(f"{left} numbers of {spot.key} are in none of its pieces", self.path, "copy it again")
        for start, _ in pieces:
            self._place(spot.key, start)  # before there is room for what may not be there
        whole = torch.empty(sizes, dtype=TYPES[info.dtype][0])
        for (start, length), cut in zip(pieces, cuts, strict=True):
            here = tuple(slice(low - at, high - at) for (low, high), at in zip(cut, offsets, strict=True))
            there = tuple(slice(low - at, high - at) for (low, high), at in zip(cut, start, strict=True))
            whole[here] = self._chunk(spot.key, start, length)[there]
        return whole.reshape(info.shape)

    def _enter(self, key: str, size: tuple[int, ...], dtype: str) -> None:
        state = STATE.fullmatch(key)
        kind, plain = (state[1], state[2]) if state else ("", key)
        wrapped = WRAPPED.fullmatch(plain)
        name = common_name(wrapped[1] if wrapped else plain)
        if OURS.fullmatch(name) is None:
            return
        if dtype not in TYPES or not all(type(each) is int and each >= 0 for each in size):
            raise CheckpointError(f"{key} is said to be {list(size)} of {dtype}", self.path / METADATA, "copy it again")
        for alone, lead, half in self._apart(key, name, size):
            shape = size[len(lead) :]
            if half is not None:
                shape = (shape[0] // 2, *shape[1:])
            (self.kinds.setdefault(kind, {}) if kind else self.names)[alone] = Info(shape, dtype)
            self._spots[kind, alone] = Spot(key, lead, half)

    def _apart(
        self, key: str, name: str, size: tuple[int, ...]
    ) -> Iterator[tuple[str, tuple[tuple[int, int], ...], int | None]]:
        """The tensors in one of the file: their names, leading indices and halves."""
        text, counts = name, []
        if found := STACKED.fullmatch(text):
            text = f"decoder.layers.{{}}.{found[1]}"
            counts.append(size[0])
        if found := EXPERTS.fullmatch(text):
            text = f"{found[1]}.{{}}.{found[2]}"
            counts.append(size[len(counts)])
        self._believed(key, counts)
        for at in product(*map(range, counts)):
            lead = tuple(zip(at, counts, strict=True))
            alone = text.format(*at)
            if self.gated and FC1.fullmatch(alone):
                yield f"{alone}_w", lead, 0
                yield f"{alone}_v", lead, 1
            else:
                yield alone, lead, None

    def _believed(self, key: str, counts: list[int]) -> None:
        """CheckpointError for more layers and experts than the pieces of a tensor have, or than any model has."""
        claimed = prod(counts)
        here = sum(prod(each.sizes[: len(counts)]) for each in self._entries[key].chunks)
        if here < claimed:
            what = f"{key} is said to be of {claimed} layers or experts, and its pieces are of {here}"
            raise CheckpointError(what, self.path / METADATA, "copy it again")
        self._claimed += claimed
        if self._claimed > MOST:
            what = f"with {key} it claims {self._claimed} tensors, {MOST} are the most that are read"
            raise CheckpointError(what, self.path / METADATA, "it is damaged, or was made to deceive: copy it again")

    def _masters(self) -> None:
        """The optimizer's own weights take the place of the model's."""
        for kind in MASTERS:
            for name, info in self.kinds.pop(kind, {}).items():
                if name in self.names and self.names[name].shape == info.shape:
                    self.names[name], self._spots["", name] = info, self._spots[kind, name]

    def _near(self, key: str, offsets: tuple[int, ...], lead: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(offsets, sizes) of the pieces of a tensor that may share numbers with a box under its leading indices."""
        grid = self._grids.get((key, lead))
        if grid is None:
            boxes = [(tuple(each.offsets), tuple(each.sizes)) for each in self._entries[key].chunks]
            depth = lead if all(size == 1 for _, sizes in boxes for size in sizes[:lead]) else 0
            grid = self._grids[key, lead] = {}
            for start, sizes in boxes:
                grid.setdefault(start[:depth], []).append((start, sizes))
        return grid.get(offsets[:lead]) or grid.get((), [])

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        if self._last and self._last[0] == (key, offsets):
            return self._last[1]
        self._last = None  # before the next one comes into memory
        file, start, length = self._place(key, offsets)
        with file.open("rb") as opened:
            numbers = read_stream(cast(IO[bytes], Window(opened, start, length)), file)
        if not isinstance(numbers, Tensor) or tuple(numbers.shape) != sizes:
            raise CheckpointError(f"{key} at {list(offsets)} is not the tensor that the index says", file, "copy it")
        self._last = (key, offsets), numbers
        return numbers

    def _common(self) -> Mapping[str, Any]:
        """The arguments of the training, its step, settings of the optimizer: in a file, or inside since 0.17."""
        file, found = self.path / COMMON, None
        if file.is_file():
            found = read_saved(file)
        elif INSIDE in self._entries:
            file, start, length = self._place(INSIDE)
            with file.open("rb") as opened:
                found = read_stream(cast(IO[bytes], Window(opened, start, length)), file)
            found = found[0] if isinstance(found, list) and found else None
        return found if isinstance(found, Mapping) else {}

    def _place(self, key: str, offsets: tuple[int, ...] | None = None) -> tuple[Path, int, int]:
        """The file of a piece, where it begins there, and how many bytes it has."""
        found: Any = self._places.get((key, offsets))
        named = getattr(found, "relative_path", None)
        if not isinstance(named, str) or Path(named).name != named or found.transform_descriptors:
            raise CheckpointError(f"{key} at {offsets} is not in a file that can be read", self.path, "copy it again")
        file = self.path / named
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing", self.path, "copy it from where the checkpoint was saved")
        size, end = file.stat().st_size, found.offset + found.length
        if found.offset < 0 or found.length < 0 or end > size:
            raise CheckpointError(f"{key} would end at byte {end}, the file has {size}", file, "copy it again")
        return file, found.offset, found.length


def _shared(
    offsets: tuple[int, ...], sizes: tuple[int, ...], start: tuple[int, ...], length: tuple[int, ...]
) -> list[tuple[int, int]]:
    """What two boxes share, (first, end) of each dimension."""
    return [(max(a, b), min(a + m, b + n)) for a, m, b, n in zip(offsets, sizes, start, length, strict=True)]


def arguments(common: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a training was started with, as it is kept beside the tensors. CheckpointError where it is not."""
    args = common.get("args")
    if args is None:
        raise CheckpointError(
            "the checkpoint does not hold the arguments that it was trained with ('args'), so its model is unknown",
            path,
            "save it with Megatron-LM's training script, which puts them in",
        )
    if not isinstance(args, argparse.Namespace):
        what = f"its 'args' are a {type(args).__name__}, where Megatron-LM keeps an argparse.Namespace"
        raise CheckpointError(what, path, "save it with Megatron-LM's training script")
    return vars(args)


class Window(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int):
        super().__init__()
        self.file, self.start, self.length, self.at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self.at))
        self.file.seek(self.start + self.at)
        got = self.file.readinto(view[:count])
        self.at += got
        return got
