"""Documents to samples of seq_len + 1 tokens: seq_len inputs, and the same shifted by one as targets.

`cut` lays all documents end to end and cuts every seq_len tokens; neighbours share one token, the last target of one
and the first input of the other. `best_fit` cuts only documents longer than a sample, in the same way, and places
the pieces whole: longest first, each into the fullest sample that still has room (best-fit decreasing).
Both predict every token of every document exactly once an epoch, but for each document's first when isolated.

A position counts from the start of the document's piece inside the sample: attention cannot see further back.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from shardforge.core.errors import DataError
from shardforge.data.corpus import Corpus, Stream
from shardforge.nn.batch import IGNORE, PADDING

GROUP = 1 << 22
"""Pieces that best_fit packs at a time; bounds memory to some 200 MB and costs under one sample a group."""


class Packing(Protocol):
    samples: int

    def spans(self, index: int) -> np.ndarray:
        """[pieces, 2] int64: stream tokens start, stop of each document piece of a sample, in order."""
        ...


class Cut:
    """Sample i is tokens i*s .. i*s+s of the stream; the last one may be shorter."""

    def __init__(self, stream: Stream, seq_len: int):
        self.stream, self.seq_len = stream, seq_len
        self.samples = max(0, -(-(stream.tokens - 1) // seq_len))

    def spans(self, index: int) -> np.ndarray:
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self.stream.tokens)
        cuts = self.stream.cuts(start, stop)
        return np.stack([cuts, np.append(cuts[1:], stop)], 1)


class BestFit:
    """Samples of whole documents, read from an index on disk."""

    def __init__(self, folder: Path):
        self.samples, pieces = json.loads((folder / "sizes.json").read_bytes())
        self._bins = np.memmap(folder / "bins.i64", np.int64, "r", shape=(self.samples + 1,)).view(np.ndarray)
        self._starts = np.memmap(folder / "starts.i64", np.int64, "r", shape=(pieces,)).view(np.ndarray)
        self._lengths = np.memmap(folder / "lengths.i32", np.int32, "r", shape=(pieces,)).view(np.ndarray)

    def spans(self, index: int) -> np.ndarray:
        first, last = self._bins[index : index + 2]
        starts = self._starts[first:last]
        return np.stack([starts, starts + self._lengths[first:last]], 1)


def pack(corpus: Corpus, split: str, seq_len: int, packing: str) -> Packing:
    """The samples of one split. best_fit builds its index beside the shards once, and any number of ranks may ask."""
    stream = corpus.stream(split)
    if packing == "cut":
        return Cut(stream, seq_len)
    folder = corpus.path / "packed" / f"{split}-{seq_len}-{corpus.fingerprint}"
    if not folder.is_dir():
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            scratch.mkdir(parents=True, exist_ok=True)
            _write_index(stream, seq_len, scratch)
            _publish(scratch, folder)
        except OSError as cause:
            raise DataError(
                f"the index of best_fit cannot be written: {cause.strerror}",
                folder,
                "make the folder writable and free some space, or set data.packing: cut",
            ) from cause
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return BestFit(folder)


def _publish(scratch: Path, folder: Path) -> None:
    try:
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another rank was faster, with the same content
            raise


def _write_index(stream: Stream, seq_len: int, folder: Path) -> None:
    samples = pieces = 0
    with (
        (folder / "bins.i64").open("wb") as bins,
        (folder / "starts.i64").open("wb") as starts,
        (folder / "lengths.i32").open("wb") as lengths,
    ):
        for first, size in _groups(stream, seq_len):
            bin_of = best_fit(size, seq_len + 1)
            order, begins = _by_bin(bin_of)
            bins.write((pieces + begins).astype(np.int64).tobytes())
            starts.write(first[order].tobytes())
            lengths.write(size[order].astype(np.int32).tobytes())
            samples, pieces = samples + begins.size, pieces + size.size
        bins.write(np.int64(pieces).tobytes())
    (folder / "sizes.json").write_text(json.dumps([samples, pieces]))


def _by_bin(bin_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pieces ordered by bin, where each bin begins), bins in the order of their first piece in the corpus."""
    _, firsts, numbers = np.unique(bin_of, return_index=True, return_inverse=True)
    rank = np.empty(firsts.size, np.int64)
    rank[np.argsort(firsts)] = np.arange(firsts.size)
    bins = rank[numbers]
    order = np.argsort(bins, kind="stable")
    counts = np.bincount(bins)
    return order, np.cumsum(counts) - counts


def _groups(stream: Stream, seq_len: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first stream token, tokens) of the pieces, in corpus order, at most about GROUP at a time."""
    waiting: list[tuple[np.ndarray, np.ndarray]] = []
    count = 0
    for shard in range(len(stream.shards)):
        reader = stream.reader(shard)
        for at in range(0, reader.documents, GROUP):
            last = min(at + GROUP, reader.documents)
            edges = np.append(reader.starts(at, last), reader.start(last)) + stream.begin(shard)
            waiting.append(split_long(edges[:-1], np.diff(edges), seq_len))
            count += waiting[-1][0].size
            if count >= GROUP:
                yield _joined(waiting)
                waiting, count = [], 0
    if count:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    starts, lengths = zip(*parts, strict=True)
    return np.concatenate(starts), np.concatenate(lengths)


def split_long(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of pieces of at most seq_len + 1 tokens; neighbours in one document share one token."""
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    parts = np.maximum(1, -(-(lengths - 1) // seq_len))
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    offset = number * seq_len
    return np.repeat(starts, parts) + offset, np.minimum(np.repeat(lengths, parts) - offset, seq_len + 1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece under best-fit decreasing. [pieces] -> [pieces] int64.

    All pieces of one length are placed together: into the bins with the least sufficient room first, and as many into
    one bin as it holds, which is what placing them one by one does. O(pieces + capacity * distinct lengths).
    """
    order = np.argsort(-lengths, kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    out = np.empty(lengths.size, np.int64)
    free: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # bin numbers by room left
    room = np.zeros(capacity + 1, bool)
    opened = taken = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = int(np.argmax(room[length:])) + length
            if room[fitting]:
                bins = np.concatenate(free[fitting])
            else:
                fitting = capacity
                bins = np.arange(opened, opened - (-left // (capacity // length)))
                opened += bins.size
            each = fitting // length
            placed = min(left, bins.size * each)
            out[order[taken : taken + placed]] = np.repeat(bins, each)[:placed]
            full, rest = divmod(placed, each)
            touched = full + (rest > 0)
            moves = [(fitting, bins[touched:]), (fitting - each * length, bins[:full])]
            if rest:
                moves.append((fitting - rest * length, bins[full:touched]))
            free[fitting], room[fitting] = [], False
            for space, moved in moves:
                if moved.size and space:
                    free[space].append(moved)
                    room[space] = True
            taken, left = taken + placed, left - placed
    return out


def fill(stream: Stream, spans: np.ndarray, joined: bool, blank: int, rows: Sequence[np.ndarray]) -> None:
    """Write one sample into four int64 rows of [s]: tokens, labels, positions, documents. `blank` pads the tokens."""
    tokens, labels, positions, documents = rows
    lengths = spans[:, 1] - spans[:, 0]
    used, size = int(lengths.sum()), tokens.size + 1
    window = np.full(size, blank, np.int64)
    runs = np.flatnonzero(np.append(True, spans[1:, 0] != spans[:-1, 1]))
    at = 0
    for start, stop in zip(spans[runs, 0], spans[np.append(runs[1:], len(spans)) - 1, 1], strict=True):
        stream.read(int(start), window[at : at + stop - start])
        at += int(stop - start)
    place, document = np.arange(size), np.full(size, PADDING)
    place[used:] -= used
    document[:used] = 0
    if not joined:
        place[:used] -= np.repeat(np.cumsum(lengths) - lengths, lengths)
        document[:used] = np.repeat(np.arange(len(lengths)), lengths)
    tokens[:], positions[:], documents[:] = window[:-1], place[:-1], document[:-1]
    labels[:] = np.where((document[1:] == document[:-1]) & (document[1:] != PADDING), window[1:], IGNORE)
