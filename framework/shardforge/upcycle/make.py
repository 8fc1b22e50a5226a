"""One job: the files of one layer, and what the report says of it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.journal import one_thread
from shardforge.families.source import Source
from shardforge.upcycle.pieces import Maker
from shardforge.upcycle.plan import Opener, Plan


@lru_cache(maxsize=1)
def _opened(opener: Opener, path: Path) -> Source:
    return opener(path)


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
    plan.journal.write(job, {"files": written, "report": report})
    return sum(int(file["bytes"]) for file in written)
