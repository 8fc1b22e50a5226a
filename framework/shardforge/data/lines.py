"""Documents from JSON lines, plain or compressed. A document is called FILE@OFFSET of its line in the plain text."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shardforge.core.errors import DataError
from shardforge.core.optional import require
from shardforge.data.sources import Document, Invalid, Part, checked, decode


def documents(part: Part) -> Iterator[Document | Invalid]:
    """The lines that begin in bytes start .. stop - 1 of the file; all of them for a compressed file."""
    path = part.paths[0]
    with opened(path) as file:
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
def opened(path: str) -> Iterator[IO[bytes]]:
    """The plain text of a file; a torn or foreign archive is a DataError."""
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with Path(path).open("rb") as raw:
        if path.endswith(".gz"):
            file: IO[bytes] = gzip.open(raw)  # noqa: SIM115, closed with raw
        elif path.endswith(".zst"):
            zstandard = require("zstandard", for_="reading .zst", extra="zstd", field=path)
            errors += (zstandard.ZstdError,)
            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
        else:
            file = raw
        try:
            yield file
        except errors as cause:
            raise DataError(f"damaged or not what its ending says: {cause}", path, "copy the file again") from cause
