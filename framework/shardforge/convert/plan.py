"""A conversion as processes get it, and the one job that there is: a file, from beginning to end."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import shardforge
import shardforge.convert.formats
from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.journal import Journal, one_thread
from shardforge.convert.format import Format, Options, Writer
from shardforge.convert.pieces import Pieces
from shardforge.core.errors import CheckpointError, suggest
from shardforge.families.fingerprint import fingerprint
from shardforge.families.source import Source
from shardforge.recipe.provenance import plain

FORMAT = 1
ALSO = {
    "hf": "huggingface",
    "safetensors": "huggingface",
    "transformers": "huggingface",
    "ds": "deepspeed",
    "universal": "deepspeed",
    "zero": "deepspeed",
    "mcore": "megatron",
    "torch_dist": "megatron",
    "ours": "shardforge",
    "sf": "shardforge",
}
"""What people call a format -> its name, for the message that tells it."""
Opener = Callable[[Path], Source]


@dataclass(frozen=True)
class Plan:
    """`opener` opens the source `path` in each process; the files go into `journal.files`."""

    path: Path
    opener: Opener
    writer: Writer
    journal: Journal


class _Worker:
    """What a process keeps from job to job."""

    plan: Plan
    source: Source


def begin(plan: Plan) -> None:
    """First thing in each process that writes."""
    _Worker.plan, _Worker.source = plan, plan.opener(plan.path)


def write(job: int) -> None:
    """Write file number `job` and its record."""
    plan = _Worker.plan
    file = plan.writer.files[job]
    path = plan.journal.files / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with one_thread(), Pieces(_Worker.source) as pieces:
        said = plan.writer.write(path, [pieces.part(item) for item in file.items])
        found = pieces.found()
    tensorfile.settle_folder(path)  # of a file it does the same
    size = said.get("bytes") or path.stat().st_size
    digest = said.get("sha256") or tensorfile.sha256(path)
    written = {"file": file.name, "bytes": size, "sha256": digest}
    plan.journal.write(job, {"files": [written], "said": said, **found})


def formats() -> dict[str, Format]:
    """Name -> format, from the files of `convert/formats`."""
    package = shardforge.convert.formats
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    modules = [cast(Format, importlib.import_module(f"{package.__name__}.{name}")) for name in names]
    return {module.NAME: module for module in modules}


def design(source: Source, options: Options) -> Writer:
    """The files of a conversion. CheckpointError for a format that nobody knows, or one that cannot say the model."""
    known = formats()
    if options.to not in known:
        fix = suggest(ALSO.get(options.to.lower(), options.to), known)
        raise CheckpointError(f"no format is called {options.to!r}", "--to", fix)
    return known[options.to].design(source, options)


def identity(source: Source, options: Options, writer: Writer, there: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What the bytes of the result depend on, as JSON. `there` are the source's files, as `certificate.files` has them:
    a fingerprint is of few numbers, and a file that was written anew may have others."""
    told = {key: str(value) if isinstance(value, Path) else value for key, value in plain(options).items()}
    del told["target"]  # a result may be moved
    files = hashlib.sha256(repr(list(writer.files)).encode()).hexdigest()[:16]
    of = {
        "numbers": fingerprint(source),
        "path": str(source.path.resolve()),
        "files": {name: f"{size} bytes, changed at {changed} ns" for name, (size, changed) in there.items()},
    }
    found = {"format": FORMAT, "version": shardforge.__version__, "source": of, "files": files}
    return json.loads(json.dumps({**found, "options": told}))
