"""An open file that torch.save writes to, hashed on the way."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import torch

from shardforge.checkpoint import tensorfile


class Hashed:
    """A new file for as long as a `with` lasts, on the disk itself when it ends well: its size and hash so far."""

    def __init__(self, path: Path):
        self.file, self.size, self.digest = path.open("xb"), 0, hashlib.sha256()
        self._failed: OSError | None = None

    def __enter__(self) -> Hashed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.file:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())

    def save(self, what: Any) -> tuple[int, int]:
        """`torch.save` at the end of the file: where it begins, and its length. OSError of a disk that is full."""
        start = self.size
        try:
            torch.save(what, cast(IO[bytes], self))
        except RuntimeError as cause:
            raise self._failed or cause from cause  # torch tells of the file what went wrong with the disk
        return start, self.size - start

    def write(self, block: Any) -> int:
        try:
            tensorfile.put(self.file, block)
        except OSError as error:
            self._failed = error
            raise
        self.digest.update(block)
        count = memoryview(block).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        self.file.flush()
