"""Which jobs of a folder are done: a record each, written after their files.

A file without a record is the rest of a killed process and is made again; a file with one is kept when its bytes still
have the hash that the record names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardforge.checkpoint import tensorfile
from shardforge.core.errors import CheckpointError

SAID = {"file", "bytes", "sha256"}
"""What a record says of each file."""


@dataclass(frozen=True)
class Journal:
    """Plain data that workers get. A record is JSON; its "files" have "file", the name in `files`, "bytes" and
    "sha256"."""

    path: Path  # of the records
    files: Path  # the folder that is made

    def write(self, job: int, record: dict[str, Any]) -> None:
        tensorfile.write_whole(self._of(job), json.dumps(record).encode())

    def read(self, job: int) -> dict[str, Any] | None:
        """None where there is none. CheckpointError for one that is damaged."""
        path = self._of(job)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as cause:
            raise self._damaged(path, str(cause)) from cause
        files = found.get("files") if isinstance(found, dict) else None
        if not isinstance(files, list) or not all(isinstance(each, dict) and each.keys() >= SAID for each in files):
            raise self._damaged(path, f"it lists no files with {', '.join(sorted(SAID))}")
        return found

    def finished(self, job: int) -> dict[str, Any] | None:
        """The record of a job whose files are what it says, read to the last byte; None when it must be done."""
        record = self.read(job)
        for file in record["files"] if record else ():
            path = self.files / file["file"]
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return None
            if not tensorfile.as_written(path, file["sha256"]):
                return None
        return record

    def _damaged(self, path: Path, why: str) -> CheckpointError:
        what = f"the record of a finished job cannot be read: {why}"
        fix = f"delete this file, and its job is done again, or delete {self.path} and start again"
        return CheckpointError(what, path, fix)

    def _of(self, job: int) -> Path:
        return self.path / f"job-{job:05d}.json"


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums do not depend on the machine's cores; several processes do not fight for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
