"""Token shards on disk: NAME.bin and NAME.idx, byte for byte the layout of Megatron-Core's IndexedDataset.

    .bin   the tokens of all documents, end to end, little-endian
    .idx   b"MMIDIDX\\0\\0", u64 version 1, u8 type code, u64 sequences, u64 documents + 1,
           int32 length of each sequence, int64 byte offset of each sequence,
           int64 first sequence of each document and the number of sequences at the end
    .names ours: b"SFNAMES\\0", u64 documents, int64 offsets (documents + 1), then the names in UTF-8

We write one sequence a document and read any number. The arrays of an .idx stand at byte 34, so they are
unaligned: numpy would copy one whole to search it, and that is why the searches here are bisections.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from shardforge.core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEAD = struct.Struct("<9sQBQQ")
TYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(kind): code for code, kind in TYPES.items()}
NAMES_MAGIC = b"SFNAMES\x00"
LONGEST = 2**31 - 1
REBUILD = "delete the folder and build it again with `shardforge data build`"


def token_type(vocab: int) -> np.dtype:
    """The type that tokens of a vocabulary are stored in; the limit is Megatron-Core's."""
    return np.dtype(np.uint16 if vocab < 65500 else np.int32)


def beside(prefix: Path, suffix: str) -> Path:
    """The file `prefix` + `suffix`; unlike `with_suffix` this keeps a dot inside the prefix."""
    return prefix.with_name(prefix.name + suffix)


@dataclass(frozen=True)
class Written:
    """What `ShardWriter.close` put on disk."""

    tokens: int
    documents: int
    bin_sha256: str
    idx_sha256: str


class ShardWriter:
    """Writes one shard; its files appear under their names only when `close` has finished."""

    def __init__(self, prefix: Path, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self._code = CODES[self.dtype]
        self._lengths: list[np.ndarray] = []
        self._hash = hashlib.sha256()
        self._scratch = {suffix: beside(prefix, f"{suffix}.{os.getpid()}.tmp") for suffix in (".bin", ".idx")}
        self._bin = self._scratch[".bin"].open("wb")

    def add(self, tokens: np.ndarray, lengths: Sequence[int] | np.ndarray | None = None) -> None:
        """Append documents that stand end to end in `tokens`; without `lengths` it is one document."""
        sizes = np.asarray([tokens.size] if lengths is None else lengths, np.int64)
        assert sizes.sum() == tokens.size, (sizes.sum(), tokens.size)
        if sizes.size and sizes.max() > LONGEST:
            raise DataError(
                f"a document of {sizes.max()} tokens is longer than the format's limit of {LONGEST}",
                self.prefix,
                "split the document",
            )
        content = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._hash.update(content)
        self._bin.write(content)
        self._lengths.append(sizes.astype(np.int32))

    def close(self) -> Written:
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        lengths = np.concatenate([*self._lengths, np.empty(0, np.int32)])
        ends = np.cumsum(lengths, dtype=np.int64)
        index_hash = hashlib.sha256()
        with self._scratch[".idx"].open("wb") as file:
            for part in index_parts(lengths, self.dtype, self._code):
                index_hash.update(part)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        for suffix, scratch in self._scratch.items():
            os.replace(scratch, beside(self.prefix, suffix))
        tokens = int(ends[-1]) if ends.size else 0
        return Written(tokens, lengths.size, self._hash.hexdigest(), index_hash.hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bin.close()
        for scratch in self._scratch.values():
            scratch.unlink(missing_ok=True)


def index_parts(lengths: np.ndarray, dtype: np.dtype, code: int) -> Iterable[bytes]:
    """The bytes of an .idx for documents of one sequence each."""
    count = lengths.size
    yield HEAD.pack(MAGIC, VERSION, code, count, count + 1)
    yield lengths.astype("<i4").tobytes()
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    yield np.concatenate([[0], ends[:-1]])[:count].astype("<i8").tobytes()
    yield np.arange(count + 1, dtype="<i8").tobytes()


class ShardReader:
    """A shard on disk, memory-mapped. Opening reads 34 bytes and compares sizes; `check` looks at every entry."""

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.bin, self.idx = beside(prefix, ".bin"), beside(prefix, ".idx")
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise DataError("the file is missing", path, f"copy it here again, or {REBUILD}")
        self.dtype, self.sequences, self.documents = self._head()
        self.tokens = self.bin.stat().st_size // self.dtype.itemsize
        self._check_ends()

    def _head(self) -> tuple[np.dtype, int, int]:
        with self.idx.open("rb") as file:
            head = file.read(HEAD.size)
        if not MAGIC.startswith(head[: len(MAGIC)]):
            raise DataError(
                f"not an index of tokens: it begins with {head[:9]!r}, expected {MAGIC!r}",
                self.idx,
                "name a folder written by `shardforge data build`, or files of Megatron-Core's IndexedDataset",
            )
        found = self.idx.stat().st_size
        if len(head) < HEAD.size:
            raise DataError(f"truncated: {found} bytes, expected at least {HEAD.size}", self.idx, REBUILD)
        _, version, code, sequences, documents = HEAD.unpack(head)
        if version != VERSION or code not in TYPES:
            raise DataError(
                f"version {version} with type code {code}, expected version {VERSION} with a code of {sorted(TYPES)}",
                self.idx,
                "convert the data to integer tokens in IndexedDataset version 1",
            )
        expected = HEAD.size + 12 * sequences + 8 * documents
        if found != expected or documents < 1:
            raise DataError(
                f"{'truncated' if found < expected else 'too long'}: {found} bytes, expected {expected} "
                f"for {sequences} sequences and {documents - 1} documents",
                self.idx,
                REBUILD,
            )
        return np.dtype(TYPES[code]), sequences, documents - 1

    def _check_ends(self) -> None:
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.sequences else 0
        found = self.bin.stat().st_size
        if found != end:
            raise DataError(
                f"{'truncated' if found < end else 'too long'}: {found} bytes, expected {end} by {self.idx.name}",
                self.bin,
                REBUILD,
            )
        first, last = int(self.firsts[0]), int(self.firsts[-1])
        if (first, last) != (0, self.sequences):
            raise DataError(
                f"inconsistent: its documents cover sequences {first} to {last}, expected 0 to {self.sequences}",
                self.idx,
                REBUILD,
            )

    @cached_property
    def _index(self) -> np.ndarray:
        return np.memmap(self.idx, np.uint8, "r").view(np.ndarray)  # one map, so one file descriptor, for three arrays

    def _map(self, kind: str, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(self._index, kind, count, offset)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[sequences] int32, tokens."""
        return self._map("<i4", self.sequences, HEAD.size)

    @cached_property
    def pointers(self) -> np.ndarray:
        """[sequences] int64, bytes."""
        return self._map("<i8", self.sequences, HEAD.size + 4 * self.sequences)

    @cached_property
    def firsts(self) -> np.ndarray:
        """[documents + 1] int64, the first sequence of each document."""
        return self._map("<i8", self.documents + 1, HEAD.size + 12 * self.sequences)

    @cached_property
    def content(self) -> np.ndarray:
        """[tokens], the whole .bin."""
        return np.memmap(self.bin, self.dtype, "r").view(np.ndarray) if self.tokens else np.empty(0, self.dtype)

    def start(self, document: int) -> int:
        """Token at which a document begins; `documents` gives the number of tokens."""
        sequence = int(self.firsts[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < self.sequences else self.tokens

    def starts(self, first: int, last: int) -> np.ndarray:
        """[last - first] int64: where documents first .. last - 1 begin, in tokens."""
        sequences = self.firsts[first:last]
        inside = bisect_left(sequences, self.sequences)
        out = np.full(last - first, self.tokens, np.int64)
        out[:inside] = self.pointers[sequences[:inside]] // self.dtype.itemsize
        return out

    def find(self, token: int) -> int:
        """Number of the document that holds a token."""
        sequence = bisect_right(self.pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self.firsts, sequence) - 1

    def document(self, number: int) -> np.ndarray:
        """The tokens of one document; a view of the file."""
        return self.content[self.start(number) : self.start(number + 1)]

    def check(self) -> None:
        """Compare every entry of the index with its neighbour, a bounded piece at a time."""
        for at in range(0, self.sequences, 1 << 20):
            lengths = self.lengths[at : at + (1 << 20)].astype(np.int64)
            pointers = self.pointers[at : at + (1 << 20)]
            after = np.append(pointers[1:], pointers[-1] + lengths[-1] * self.dtype.itemsize)
            before = 0 if at == 0 else int(self.pointers[at - 1]) + int(self.lengths[at - 1]) * self.dtype.itemsize
            wrong = (lengths < 0) | (after - pointers != lengths * self.dtype.itemsize)
            if int(pointers[0]) != before or wrong.any():
                number = at + (int(np.argmax(wrong)) if wrong.any() else 0)
                raise DataError(f"inconsistent: lengths and offsets disagree near sequence {number}", self.idx, REBUILD)
        for at in range(0, self.documents, 1 << 20):
            firsts = self.firsts[at : at + (1 << 20) + 1]
            if (np.diff(firsts) < 0).any():
                raise DataError("inconsistent: a document begins before the one in front of it", self.idx, REBUILD)


def write_names(path: Path, names: Sequence[bytes]) -> None:
    """The side file that names documents, written beside and renamed."""
    offsets = np.zeros(len(names) + 1, "<i8")
    np.cumsum([len(name) for name in names], out=offsets[1:])
    scratch = beside(path, f".{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        file.write(NAMES_MAGIC + struct.pack("<Q", len(names)))
        file.write(offsets.tobytes())
        file.write(b"".join(names))
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


class NamesReader:
    """Names of a shard's documents, memory-mapped."""

    def __init__(self, path: Path):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
        if len(head) < 16 or not head.startswith(NAMES_MAGIC):
            raise DataError(f"not a list of names: begins with {head[:8]!r}, expected {NAMES_MAGIC!r}", path, REBUILD)
        self.count = struct.unpack("<Q", head[8:])[0]
        self._base = 16 + 8 * (self.count + 1)
        if size < self._base:
            raise DataError(f"truncated: {size} bytes, expected at least {self._base}", path, REBUILD)
        self._offsets = np.memmap(path, "<i8", "r", 16, (self.count + 1,)).view(np.ndarray)
        expected = self._base + int(self._offsets[-1])
        if size != expected:
            raise DataError(f"truncated or too long: {size} bytes, expected {expected}", path, REBUILD)
        self._content = np.memmap(path, np.uint8, "r").view(np.ndarray)

    def __getitem__(self, document: int) -> str:
        start, stop = self._offsets[document : document + 2] + self._base
        return self._content[start:stop].tobytes().decode()
