"""The documents of one part of the input, in order.

Names: a file's path below its folder; FILE@OFFSET for a JSON line, the offset in the plain text; FILE#ROW for a row.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from shardforge.core.errors import DataError
from shardforge.core.optional import require
from shardforge.data.sources import Part, load, parquet


class Document(NamedTuple):
    name: str
    text: str


class Invalid(NamedTuple):
    """A document that cannot be read as text."""

    name: str
    reason: str


Read = Iterator[Document | Invalid]


def read(part: Part) -> Read:
    """Documents and what cannot be read as one."""
    return READERS[part.kind](part)


def decode(name: str, content: bytes) -> Document | Invalid:
    try:
        return Document(name, content.decode())
    except UnicodeDecodeError as error:
        return Invalid(name, f"byte {error.start} (0x{content[error.start]:02x}) is not UTF-8")


def checked(name: str, text: object, field: str) -> Document | Invalid:
    """A document from a parsed value; JSON can hold half characters that UTF-8 cannot."""
    if not isinstance(text, str):
        found = "missing" if text is None else type(text).__name__
        return Invalid(name, f"field {field!r} is {found}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Invalid(name, f"character {error.start} is half of a surrogate pair")
    return Document(name, text)


def files(part: Part) -> Read:
    for path, name in zip(part.paths, part.names, strict=True):
        yield decode(name, Path(path).read_bytes())


def lines(part: Part) -> Read:
    """The lines that begin in bytes start .. stop - 1 of the plain text; all of them when stop is negative."""
    with plain(part.paths[0]) as file:
        offset = part.start
        if offset:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # the part in front reads a line that reaches into this one
        while part.stop < 0 or offset < part.stop:
            line = file.readline()
            if not line:
                return
            if line.strip():
                yield parse(f"{part.names[0]}@{offset}", line, part.field)
            offset += len(line)


def parse(name: str, line: bytes, field: str) -> Document | Invalid:
    """The text of one JSON object."""
    text = decode(name, line)
    if isinstance(text, Invalid):
        return text
    try:
        value = json.loads(text.text)
    except ValueError as error:
        return Invalid(name, f"not JSON: {error}")
    if not isinstance(value, dict):
        return Invalid(name, f"a JSON {type(value).__name__}, expected an object")
    return checked(name, value.get(field), field)


@contextmanager
def plain(path: str) -> Iterator[IO[bytes]]:
    """The plain text of a file; a torn or foreign archive is a DataError."""
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with Path(path).open("rb") as raw:
        file: IO[bytes] = raw
        if path.endswith(".gz"):
            file = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif path.endswith(".zst"):
            zstandard = require("zstandard", for_="reading .zst", extra="zstd", field=path)
            errors += (zstandard.ZstdError,)
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        try:
            yield file
        except errors as cause:
            raise DataError(f"damaged, or not what its ending says: {cause}", path, "copy the file again") from cause


def row_groups(part: Part) -> Read:
    with parquet(part.paths[0]) as file:
        row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
        groups = list(range(part.start, part.stop))
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[part.field]):
            for text in batch.column(0).to_pylist():
                yield checked(f"{part.names[0]}#{row}", text, part.field)
                row += 1


def rows(part: Part) -> Read:
    table = load(part.paths[0])
    for row in range(part.start, part.stop):
        yield checked(f"{part.names[0]}#{row}", table[row][part.field], part.field)


def stream(part: Part) -> Read:
    table = load(part.paths[0]).shard(num_shards=part.stop, index=part.start)
    for row, content in enumerate(table):
        yield checked(f"{part.names[0]}#{part.start}.{row}", content.get(part.field), part.field)


READERS: dict[str, Callable[[Part], Read]] = {
    "text": files,
    "lines": lines,
    "parquet": row_groups,
    "arrow": rows,
    "stream": stream,
}
