"""What can be read, and how it is cut into parts; documents.py reads one part.

    stdlib            every .py file of the running Python's standard library, site-packages left out
    hf:NAME[?config=C&split=S&revision=R]   a Hugging Face dataset, streamed; or the folder of `save_to_disk`
    a folder          every file below it whose ending is known, in sorted order, hidden folders left out
    .jsonl(.gz|.zst)  one JSON object a line
    .parquet          one document a row
    any other file    one document

Parts depend on the inputs only, so whoever reads them, in whatever order, the corpus comes out the same.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from shardforge.core.errors import DataError, ForgeError, Problems
from shardforge.core.optional import require

TEXT = """
.txt .md .rst .tex .html .htm .xml .csv .tsv .yaml .yml .toml .ini .cfg .json .py .pyi .c .h .cc .cpp .cxx .hpp
.cu .cuh .rs .go .java .kt .scala .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .hs .ml .swift .sh .bash .sql .css
""".split()
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
UNSEEN = ("__pycache__", "site-packages", "dist-packages")
HF = "hf:"
FIELDS = {"config", "split", "revision"}
SMALLEST, LARGEST, PARTS = 1 << 20, 1 << 28, 1024
"""Bytes of a part: a thousandth of all input, within these limits."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of the input that one worker reads."""

    kind: str  # "text", "lines", "parquet", "arrow" or "stream"
    paths: tuple[str, ...]
    names: tuple[str, ...]  # of the files, as documents will be called
    start: int = 0  # bytes of lines, row groups of parquet, rows of arrow, shard of a stream
    stop: int = 0
    size: int = 0  # bytes of input
    stamp: tuple[int, ...] = ()  # size and modification time of each file, to see that an input changed
    field: str = "text"
    lenient: bool = False  # invalid documents are expected here

    def identity(self) -> list[object]:
        """What the documents depend on; where the files lie is not part of it."""
        return [self.kind, self.names, self.start, self.stop, self.stamp, self.field]


class Plan(NamedTuple):
    parts: list[Part]
    ignored: int  # files of unknown kind


def plan(inputs: Sequence[str], field: str = "text", output: Path | None = None) -> Plan:
    """Cut all inputs into parts; `output` is not looked into. Inputs that do not exist are reported together."""
    without = output.resolve() if output else None
    problems: list[ForgeError] = []
    files: list[tuple[Path, str, bool]] = []
    parts: list[Part] = []
    ignored = 0
    for name in inputs:
        try:
            if name.startswith(HF):
                parts += _dataset(name, field)
                continue
            found, unknown = _files(name, without)
        except ForgeError as error:
            problems.append(error)
            continue
        ignored += unknown
        files += found
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(problems, "the inputs")
    return Plan([*cut(files, field), *parts], ignored)


def _files(name: str, without: Path | None) -> tuple[list[tuple[Path, str, bool]], int]:
    """((path, name, lenient) of each file, number of files of unknown kind)."""
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return [(path, label, True) for path, label in _below(root, "", without) if path.suffix == ".py"], 0
    root = Path(name).expanduser()
    if root.is_file():
        return [(root, root.name, False)], 0
    if root.is_dir():
        found = _below(root, root.resolve().name + "/", without)
        known = [(path, label, False) for path, label in found if path.suffix.lower() in TEXT or _special(path)]
        return known, len(found) - len(known)
    raise DataError("no file or folder is here", name, "name files, folders, hf:NAME or stdlib")


def _special(path: Path) -> bool:
    return path.name.endswith((*LINES, ".parquet"))


def _below(root: Path, prefix: str, without: Path | None) -> list[tuple[Path, str]]:
    """All files under a folder, sorted by name; hidden, byte-code and site-packages folders left out."""
    out = []
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d not in UNSEEN and d[0] != "." and Path(folder, d).resolve() != without]
        out += [Path(folder, name) for name in names if name[0] != "."]
    named = [(path, prefix + path.relative_to(root).as_posix()) for path in out if path.is_file()]
    return sorted(named, key=lambda pair: pair[1])


def cut(files: Sequence[tuple[Path, str, bool]], field: str) -> list[Part]:
    """Parts of about equal size; small files share a part, plain lines and parquet are cut inside a file."""
    stats = [path.stat() for path, _, _ in files]
    target = min(LARGEST, max(SMALLEST, sum(stat.st_size for stat in stats) // PARTS))
    parts: list[Part] = []
    for (path, name, lenient), stat in zip(files, stats, strict=True):
        part = Part(
            kind="text", paths=(str(path),), names=(name,), size=stat.st_size,
            stamp=(stat.st_size, stat.st_mtime_ns), field=field, lenient=lenient,
        )  # fmt: skip
        last = parts[-1] if parts else None
        if name.endswith(".parquet"):
            parts += _row_groups(replace(part, kind="parquet"), target)
        elif name.endswith(".jsonl"):
            for start in range(0, stat.st_size, target):
                stop = min(start + target, stat.st_size)
                parts.append(replace(part, kind="lines", start=start, stop=stop, size=stop - start))
        elif name.endswith(LINES):
            parts.append(replace(part, kind="lines", stop=-1))
        elif last and last.kind == "text" and last.lenient == lenient and last.size + part.size <= target:
            parts[-1] = replace(
                last, paths=last.paths + part.paths, names=last.names + part.names,
                size=last.size + part.size, stamp=last.stamp + part.stamp,
            )  # fmt: skip
        else:
            parts.append(part)
    return parts


def parquet(path: str) -> Any:
    """An open `pyarrow.parquet.ParquetFile`."""
    module = require("pyarrow.parquet", for_="reading .parquet", extra="parquet", field=path)
    try:
        return module.ParquetFile(path)
    except (OSError, ValueError) as cause:
        raise DataError(f"not a readable parquet file: {cause}", path, "copy the file again or leave it out") from cause


def _row_groups(part: Part, target: int) -> Iterator[Part]:
    with parquet(part.paths[0]) as file:
        if part.field not in file.schema_arrow.names:
            raise _no_field(part.paths[0], part.field, file.schema_arrow.names)
        sizes = [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]
    start = total = 0
    for group, size in enumerate(sizes):
        total += size
        if total >= target or group == len(sizes) - 1:
            yield replace(part, start=start, stop=group + 1, size=total)
            start, total = group + 1, 0


def _no_field(where: str, field: str, present: Sequence[str]) -> DataError:
    return DataError(f"no column {field!r}", where, f"set text_field to one of {', '.join(present)}")


def _dataset(source: str, field: str) -> list[Part]:
    name, _, query = source.removeprefix(HF).partition("?")
    options = dict(parse_qsl(query))
    if unknown := sorted(set(options) - FIELDS):
        raise DataError(f"unknown option {unknown[0]!r}", source, f"options are {', '.join(sorted(FIELDS))}")
    part = Part(kind="stream", paths=(source,), names=(f"{HF}{name}",), field=field)
    rows = load(source)
    if field not in (rows.column_names or [field]):
        raise _no_field(source, field, rows.column_names)
    if hasattr(rows, "num_rows"):  # on disk, any row at once
        count = len(rows)
        step = max(1, min(count, 100_000) // 16)
        stamp = (count, int(rows._fingerprint, 16))
        return [
            replace(part, kind="arrow", start=at, stop=min(at + step, count), size=min(step, count - at), stamp=stamp)
            for at in range(0, count, step)
        ]
    return [replace(part, start=shard, stop=rows.num_shards) for shard in range(rows.num_shards)]


def load(source: str) -> Any:
    """A `datasets.Dataset` from disk, or an `IterableDataset` that streams."""
    datasets = require("datasets", for_="reading a Hugging Face dataset", extra="hf", field=source)
    name, _, query = source.removeprefix(HF).partition("?")
    options = dict(parse_qsl(query))
    split = options.get("split", "train")
    folder = Path(name).expanduser()
    try:
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))[split]
        return datasets.load_dataset(
            str(folder) if folder.exists() else name,
            options.get("config"),
            split=split,
            revision=options.get("revision"),
            streaming=True,
        )
    except Exception as cause:  # the package raises its own, requests' and huggingface_hub's errors
        reason = (str(cause).splitlines() or [""])[0]
        what = f"the dataset cannot be opened: {type(cause).__name__}: {reason}"
        raise DataError(what, source, "check the name and the network, or name a local folder") from cause
