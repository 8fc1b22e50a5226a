"""Tokenised parts to shards: who is held out, where shards begin, and the copying of one shard.

All of it follows from the parts, so shards may be written in any order by any process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shardforge.data.manifest import ShardRecord, replace
from shardforge.data.shards import ShardWriter, beside, write_names
from shardforge.data.tokenize import tokens


class Segment(NamedTuple):
    """Documents first .. last - 1 among those of one split in one part."""

    part: int
    first: int
    last: int


@dataclass(frozen=True)
class Split:
    """Held out is a document whose name hashes below `threshold`, with at most one exception on either side."""

    threshold: int
    added: tuple[int, int] | None = None  # (part, document) held out although its hash is above
    returned: tuple[int, int] | None = None  # trained on although its hash is below

    def held_out(self, part: int, hashes: np.ndarray) -> np.ndarray:
        """[documents] bool."""
        out = hashes < np.uint64(self.threshold)
        for exception, value in ((self.added, True), (self.returned, False)):
            if exception and exception[0] == part:
                out[exception[1]] = value
        return out

    def members(self, split: str, part: int, hashes: np.ndarray) -> np.ndarray:
        """Numbers of the part's documents that belong to `split`, ascending."""
        held = self.held_out(part, hashes)
        return np.flatnonzero(held if split == "held_out" else ~held)


def choose(folder: Path, parts: int, threshold: int) -> Split:
    """The split of all parts. With two documents or more neither side is empty, unless nothing is to be held out."""
    lowest = highest = None
    held = total = 0
    for part in range(parts):
        hashes = tokens(folder, part).hashes
        if not hashes.size:
            continue
        low, high = int(hashes.argmin()), int(hashes.argmax())
        lowest = min(filter(None, (lowest, (int(hashes[low]), part, low))))
        highest = max(filter(None, (highest, (int(hashes[high]), part, high))))
        held += int((hashes < np.uint64(threshold)).sum())
        total += hashes.size
    if threshold and lowest and total > 1 and not held:
        return Split(threshold, added=lowest[1:])
    if highest and held == total:
        return Split(threshold, returned=highest[1:])
    return Split(threshold)


def shards(folder: Path, parts: int, rule: Split, split: str, limit: int) -> Iterator[list[Segment]]:
    """The segments of each shard: a shard ends with the document that brings it to `limit` tokens or more."""
    segments: list[Segment] = []
    held = 0
    for part in range(parts):
        found = tokens(folder, part)
        ends = np.cumsum(found.lengths[rule.members(split, part, found.hashes)])
        first, base = 0, 0
        while first < ends.size:
            last = int(np.searchsorted(ends, base + limit - held)) + 1
            if last > ends.size:
                segments.append(Segment(part, first, ends.size))
                held += int(ends[-1]) - base
                break
            yield [*segments, Segment(part, first, last)]
            segments, held, first, base = [], 0, last, int(ends[last - 1])
    if segments:
        yield segments


class Made(NamedTuple):
    """A finished shard, as its journal entry tells it."""

    record: ShardRecord
    text_bytes: int
    counts: np.ndarray  # [vocab] int64, how often each token occurs


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to write."""

    prefix: Path
    parts: Path  # folder of the tokenised parts
    journal: Path  # folder of the finished shards' entries
    rule: Split
    split: str
    segments: list[Segment]
    dtype: str
    vocab: int


def write(job: Job) -> None:
    """Copy one shard together, and enter it into the journal when its files are in place."""
    prefix, dtype, vocab = job.prefix, job.dtype, job.vocab
    entry = job.journal / f"{prefix.name}.json"
    if entry.exists():
        return
    names: list[bytes] = []
    counts = np.zeros(vocab, np.int64)
    text_bytes = 0
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for segment in job.segments:
            part = tokens(job.parts, segment.part)
            members = job.rule.members(job.split, segment.part, part.hashes)[segment.first : segment.last]
            ends = np.cumsum(part.lengths)
            for run in np.split(members, np.flatnonzero(np.diff(members) > 1) + 1):
                first = int(ends[run[0]] - part.lengths[run[0]])
                count = int(ends[run[-1]]) - first
                copied = np.fromfile(part.content, dtype, count, offset=first * np.dtype(dtype).itemsize)
                counts += np.bincount(copied, minlength=vocab)
                writer.add(copied, part.lengths[run])
            names += [part.names[document] for document in members]
            text_bytes += int(part.sizes[members].sum())
        written = writer.close()
    write_names(beside(prefix, ".names"), names)
    np.save(job.journal / f"{prefix.name}.npy", counts, allow_pickle=False)
    record = ShardRecord(name=prefix.name, **dataclasses.asdict(written))
    replace(entry, json.dumps({"record": dataclasses.asdict(record), "text_bytes": text_bytes}).encode())


def read(journal: Path, name: str) -> Made:
    """The journal entry of a finished shard."""
    raw = json.loads((journal / f"{name}.json").read_bytes())
    return Made(ShardRecord(**raw["record"]), raw["text_bytes"], np.load(journal / f"{name}.npy", allow_pickle=False))
