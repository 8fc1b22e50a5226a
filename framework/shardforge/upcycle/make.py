"""One job: the files of one layer, written beside a journal that says when they are whole.

A file without a record is the rest of a killed process and is made again; a file with one is kept when its bytes still
have the hash that the record names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from shardforge.checkpoint import tensorfile
from shardforge.families.source import Source
from shardforge.upcycle.pieces import Maker
from shardforge.upcycle.plan import Opener, Plan


@lru_cache(maxsize=1)
def _opened(opener: Opener, path: Path) -> Source:
    return opener(path)


def record_of(journal: Path, job: int) -> Path:
    return journal / f"job-{job:05d}.json"


def make(job: int, *, plan: Plan) -> int:
    """Write the files of a job and its record; the bytes written come back."""
    written = []
    with one_thread():
        maker = Maker(plan, job, _opened(plan.opener, plan.source))
        for name, items in plan.files(job):
            (plan.folder / name).unlink(missing_ok=True)
            done = tensorfile.write_tensors(plan.folder / name, [maker.part(item) for item in items])
            written.append(vars(done))
        report = maker.gauge.report() if maker.gauge is not None else None
    record = {"files": written, "report": report}
    tensorfile.write_whole(record_of(plan.journal, job), json.dumps(record).encode())
    return sum(int(file["bytes"]) for file in written)


def finished(job: int, *, plan: Plan) -> dict[str, Any] | None:
    """The record of a job whose files are what it says, read to the last byte; None when it must be done."""
    record = read_record(plan, job)
    for file in record["files"] if record else ():
        path = plan.folder / file["file"]
        if not path.is_file() or path.stat().st_size != file["bytes"] or tensorfile.sha256(path) != file["sha256"]:
            return None
    return record


def read_record(plan: Plan, job: int) -> dict[str, Any] | None:
    path = record_of(plan.journal, job)
    return json.loads(path.read_bytes()) if path.is_file() else None


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums do not depend on the machine's cores; several processes do not fight for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
