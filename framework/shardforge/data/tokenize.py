"""One part of the input to tokens: the work of one process, repeatable and independent of all others.

A finished part is two files: N.bin, the tokens, and N.npz, which is renamed into place last and so marks it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np

from shardforge.data.documents import Invalid, read
from shardforge.data.sources import Part
from shardforge.data.tokenizer import name_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BATCH = 1 << 20
"""Characters given to the tokenizer at a time; longer documents go in pieces cut after a line."""


class Tokens(NamedTuple):
    """A tokenised part, documents in order."""

    content: Path  # their tokens, end to end
    lengths: np.ndarray  # tokens of each, its end included
    sizes: np.ndarray  # bytes of text of each
    hashes: np.ndarray  # uint64, of the names
    names: list[bytes]
    invalid: list[tuple[str, str]]  # name, reason
    empty: int  # documents of no characters


def paths(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"{number:06d}.bin", folder / f"{number:06d}.npz"


class _Kept:
    """The texts of a part, and beside them what is remembered of each document."""

    def __init__(self, part: Part):
        self.part = part
        self.names: list[bytes] = []
        self.sizes: list[int] = []
        self.hashes: list[int] = []
        self.invalid: list[tuple[str, str]] = []
        self.empty = 0

    def __iter__(self) -> Iterator[str]:
        for document in read(self.part):
            if isinstance(document, Invalid):
                self.invalid.append((document.name, document.reason))
            elif not document.text:
                self.empty += 1
            else:
                self.names.append(document.name.encode())
                self.sizes.append(len(document.text.encode()))
                self.hashes.append(name_hash(document.name))
                yield document.text


def tokenize(part: Part, number: int, folder: Path, tokenizer: Tokenizer, end: int, dtype: str) -> int:
    """Write one part unless it is there already; bytes of input come back."""
    content, marker = paths(folder, number)
    if marker.exists():
        return part.size
    scratch = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in (content, marker)]
    lengths: list[int] = []
    kept = _Kept(part)
    with scratch[0].open("wb") as file:
        for ids in encode(tokenizer, iter(kept), end):
            file.write(ids.astype(dtype).tobytes())
            lengths.append(ids.size)
        _settle(file)
    with scratch[1].open("wb") as file:
        np.savez(
            file,
            lengths=np.array(lengths, np.int64),
            sizes=np.array(kept.sizes, np.int64),
            hashes=np.array(kept.hashes, np.uint64),
            names=np.frombuffer(b"".join(kept.names), np.uint8),
            ends=np.cumsum([0, *(len(name) for name in kept.names)], dtype=np.int64),
            invalid=np.array(kept.invalid, np.str_).reshape(-1, 2),
            empty=kept.empty,
        )
        _settle(file)
    os.replace(scratch[0], content)
    os.replace(scratch[1], marker)
    return part.size


def _settle(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def encode(tokenizer: Tokenizer, texts: Iterator[str], end: int) -> Iterator[np.ndarray]:
    """The ids of each text and `end`, int64; the tokenizer works on many short texts or one piece of a long one."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        if len(text) > BATCH:
            yield from _encode(tokenizer, waiting, end)
            waiting, size = [], 0
            pieces = (tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids for piece in cut(text))
            yield np.append(np.concatenate([np.array(ids, np.int64) for ids in pieces]), end)
            continue
        waiting.append(text)
        size += len(text)
        if size >= BATCH:
            yield from _encode(tokenizer, waiting, end)
            waiting, size = [], 0
    yield from _encode(tokenizer, waiting, end)


def _encode(tokenizer: Tokenizer, texts: Sequence[str], end: int) -> Iterator[np.ndarray]:
    for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
        yield np.array([*encoding.ids, end], np.int64)


def cut(text: str) -> Iterator[str]:
    """Pieces of at most BATCH characters, cut after a newline where there is one."""
    start = 0
    while start < len(text):
        stop = min(start + BATCH, len(text))
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def tokens(folder: Path, number: int) -> Tokens:
    """What `tokenize` wrote."""
    content, marker = paths(folder, number)
    with np.load(marker, allow_pickle=False) as saved:
        blob, ends = saved["names"].tobytes(), saved["ends"].tolist()
        names = [blob[first:last] for first, last in pairwise(ends)]
        invalid = [(str(name), str(reason)) for name, reason in saved["invalid"]]
        return Tokens(content, saved["lengths"], saved["sizes"], saved["hashes"], names, invalid, int(saved["empty"]))
