"""A built corpus: its manifest, its tokenizer file and, per split, one stream of tokens over all shards."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardforge.core.errors import DataError, ForgeError, Problems
from shardforge.data import manifest as manifests
from shardforge.data.manifest import Manifest, ShardRecord
from shardforge.data.shards import HEAD, REBUILD, NamesReader, ShardReader, beside

OPEN_SHARDS = 64
"""Shards kept mapped at once by one stream; each holds two file descriptors."""


class Place(NamedTuple):
    """A run of tokens inside one document."""

    shard: str
    document: int  # number inside the shard
    name: str
    start: int  # tokens from the start of the document
    stop: int


class Stream:
    """The documents of one split, end to end, as one sequence of `tokens` tokens. Safe to share between threads."""

    def __init__(self, folder: Path, shards: tuple[ShardRecord, ...]):
        self.folder, self.shards = folder, shards
        self.ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self._ends: list[int] = self.ends.tolist()
        self.tokens = self._ends[-1] if shards else 0
        self.documents = sum(shard.documents for shard in shards)
        self._open: OrderedDict[int, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._names = lru_cache(maxsize=OPEN_SHARDS)(lambda path: NamesReader(path) if path.is_file() else None)

    def begin(self, shard: int) -> int:
        """First token of a shard in the stream."""
        return self._ends[shard - 1] if shard else 0

    def reader(self, shard: int) -> ShardReader:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = ShardReader(self.folder / self.shards[shard].name)
                if len(self._open) > OPEN_SHARDS:
                    self._open.popitem(last=False)  # arrays read from it keep the map alive
            self._open.move_to_end(shard)
            return self._open[shard]

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first token inside it, last + 1) for tokens start .. stop - 1 of the stream."""
        out = []
        while start < stop:
            shard = bisect_right(self._ends, start)
            base, end = self.begin(shard), min(stop, self._ends[shard])
            out.append((shard, start - base, end - base))
            start = end
        return out

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the tokens from `start` on."""
        done = 0
        for shard, first, last in self.pieces(start, start + out.size):
            out[done : done + last - first] = self.reader(shard).content[first:last]
            done += last - first

    def cuts(self, start: int, stop: int) -> np.ndarray:
        """Where pieces of one document each begin in tokens start .. stop - 1; the first is `start`. int64."""
        out = []
        for shard, first, last in self.pieces(start, stop):
            reader = self.reader(shard)
            starts = reader.starts(reader.find(first) + 1, reader.find(last - 1) + 1)
            base = self.begin(shard)
            out += [np.array([first + base]), starts[np.diff(starts, append=last) > 0] + base]
        return np.concatenate(out)

    def places(self, start: int, stop: int) -> list[Place]:
        """The documents that hold tokens start .. stop - 1 of the stream."""
        out = []
        edges = [*self.cuts(start, stop).tolist(), stop]
        for first, last in pairwise(edges):
            shard = bisect_right(self._ends, first)
            reader, base = self.reader(shard), self.begin(shard)
            number = reader.find(first - base)
            origin = base + reader.start(number)
            name = self.name(shard, number)
            out.append(Place(self.shards[shard].name, number, name, first - origin, last - origin))
        return out

    def name(self, shard: int, document: int) -> str:
        """Name of a document; shards of other programs have none, and give its number."""
        names = self._names(beside(self.folder / self.shards[shard].name, ".names"))
        return names[document] if names else f"{self.shards[shard].name}#{document}"


@dataclass(frozen=True)
class Corpus:
    """A folder that `shardforge data build` finished."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Read the manifest and compare the size of every file with it; nothing else is read."""
        folder = Path(path)
        corpus = cls(folder, manifests.read(folder))
        corpus._raise([*corpus._tokenizer_problems(), *corpus._size_problems()])
        if not corpus.manifest.tokens("train"):
            raise DataError("the corpus is empty: 0 tokens to train on", folder, REBUILD)
        return corpus

    @property
    def fingerprint(self) -> str:
        return manifests.fingerprint(self.manifest)

    @property
    def tokenizer(self) -> Path:
        return self.path / self.manifest.tokenizer.file

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        return {split: Stream(self.path, self.manifest.splits.get(split, ())) for split in manifests.SPLITS}

    def stream(self, split: str) -> Stream:
        return self._streams[split]

    def verify(self, workers: int | None = None) -> None:
        """Hash every file and check every index entry, on all cores; all differences are raised together."""
        jobs: list[Callable[[], ForgeError | None]] = [
            partial(self._shard_problem, shard) for shards in self.manifest.splits.values() for shard in shards
        ]
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:  # hashing releases the interpreter lock
            found = list(pool.map(lambda job: job(), jobs))
        self._raise([*self._tokenizer_problems(), *(problem for problem in found if problem)])

    def _raise(self, problems: list[ForgeError]) -> None:
        if problems:
            raise problems[0] if len(problems) == 1 else Problems(problems, f"the corpus {self.path}")

    def _tokenizer_problems(self) -> list[ForgeError]:
        wanted = self.manifest.tokenizer
        if not self.tokenizer.is_file():
            return [DataError("the tokenizer is missing", self.tokenizer, "copy it here from where it was built")]
        found = manifests.sha256(self.tokenizer)
        if found == wanted.sha256:
            return []
        return [
            DataError(
                f"not the tokenizer of this corpus: sha256 {found[:16]}…, expected {wanted.sha256[:16]}…",
                self.tokenizer,
                "put the original file back, or build the corpus again with this tokenizer",
            )
        ]

    def _size_problems(self) -> list[ForgeError]:
        width = np.dtype(self.manifest.dtype).itemsize
        out: list[ForgeError] = []
        for shard in (shard for shards in self.manifest.splits.values() for shard in shards):
            sizes = {".bin": shard.tokens * width, ".idx": HEAD.size + 12 * shard.documents + 8 * (shard.documents + 1)}
            for suffix, expected in sizes.items():
                path = beside(self.path / shard.name, suffix)
                try:
                    found = path.stat().st_size
                except FileNotFoundError:
                    out.append(DataError(f"the file is missing, expected {expected} bytes", path, REBUILD))
                    continue
                if found != expected:
                    kind = "truncated" if found < expected else "too long"
                    what = f"{kind}: {found} bytes, expected {expected} by {manifests.FILE}"
                    out.append(DataError(what, path, REBUILD))
        return out

    def _shard_problem(self, shard: ShardRecord) -> ForgeError | None:
        for suffix, expected in ((".bin", shard.bin_sha256), (".idx", shard.idx_sha256)):
            path = beside(self.path / shard.name, suffix)
            found = manifests.sha256(path) if path.is_file() else "missing"
            if found != expected:
                return DataError(f"changed: sha256 {found[:16]}, expected {expected[:16]}", path, REBUILD)
        try:
            ShardReader(self.path / shard.name).check()
            names = beside(self.path / shard.name, ".names")
            if names.is_file() and NamesReader(names).count != shard.documents:
                return DataError(f"{NamesReader(names).count} names, expected {shard.documents}", names, REBUILD)
        except DataError as error:
            return error
        return None
