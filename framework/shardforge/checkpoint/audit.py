"""Is a checkpoint whole, unchanged, finite, and of this model? Nothing here changes a file or a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardforge.checkpoint import folders, index, tensorfile
from shardforge.checkpoint.index import Chunk, Entry
from shardforge.checkpoint.storage import stored
from shardforge.core.errors import CheckpointError

THREADS = 8
BLOCK_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Report:
    """What an audit of one checkpoint found; `problems` are sentences, empty when it is sound."""

    path: Path
    step: int
    files: int
    bytes: int
    tensors: int
    problems: tuple[str, ...]


def audit(path: Path) -> Report:
    """Read all of a step's folder: marker, sizes, SHA-256, tensors against index and manifest, non-finite numbers.

    Raises CheckpointError only when there is no checkpoint to look at.
    """
    if not path.is_dir():
        raise CheckpointError("no such folder", path, "give a run directory or one of its step folders")
    problems: list[str] = []
    manifest: Mapping[str, Any] = {}
    entries: Mapping[str, Entry] = {}
    try:
        manifest = folders.read_manifest(path)
    except CheckpointError as error:
        problems.append(error.what)
    try:
        entries = index.read(path)
    except CheckpointError as error:
        problems.append(error.what)
    records = {record["file"]: record for record in manifest.get("files", ())}
    chunks: dict[str, list[tuple[Chunk, Entry]]] = defaultdict(list)
    for entry in entries.values():
        for chunk in entry.chunks:
            chunks[chunk.file].append((chunk, entry))
    present = {file.name for file in path.iterdir()} - {folders.MARKER, folders.MANIFEST}
    names = sorted(records.keys() | chunks.keys() | present)
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(lambda name: _file(path / name, records.get(name), chunks.get(name, [])), names):
            problems += found
    if manifest and entries:
        problems += _unlike_index(manifest.get("describe", {}), entries)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return Report(path, int(manifest.get("step", -1)), len(names), size, len(entries), tuple(problems))


def compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes a checkpoint one of another model: one line for each weight missing, extra, or of another shape.

    Both are `describe` dictionaries; only their "model" tables count.
    """
    old, new = saved.get("model", {}), now.get("model", {})
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if (was := _kind(old.get(name))) != (is_ := _kind(new.get(name))):
            lines.append(f"{name}: {was} in the checkpoint, {is_} here")
    return lines


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Manifest and index of a committed checkpoint whose files are all there; CheckpointError says what is not."""
    manifest = folders.read_manifest(folder)
    if broken := list(sizes(folder, manifest)):
        raise CheckpointError(f"the checkpoint is damaged:\n{index.shorten(broken)}", folder, index.DAMAGED)
    hashes = {record["file"]: record["sha256"] for record in manifest["files"]}
    if tensorfile.sha256(folder / index.NAME) != hashes.get(index.NAME):
        raise CheckpointError("the index is not the one that was committed", folder / index.NAME, index.DAMAGED)
    return manifest, index.read(folder)


def sizes(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """The quick part of an audit: files that are missing or have another length than when they were committed."""
    for record in manifest["files"]:
        path = folder / record["file"]
        if not path.is_file():
            yield f"{path.name} is missing"
        elif (size := path.stat().st_size) != record["bytes"]:
            yield f"{path.name} has {size} bytes, {record['bytes']} were committed"


def _kind(weight: Mapping[str, Any] | None) -> str:
    return "absent" if weight is None else f"{list(weight['shape'])} {weight['dtype']}"


def _file(path: Path, record: Mapping[str, Any] | None, chunks: list[tuple[Chunk, Entry]]) -> list[str]:
    if not path.is_file():
        return [f"{path.name} is missing"]
    if record is None:
        return [f"{path.name} does not belong to this checkpoint"]
    problems = list(sizes(path.parent, {"files": [record]}))
    if not problems and not tensorfile.as_written(path, record["sha256"]):
        problems.append(f"{path.name} is not what was written: its SHA-256 differs from the manifest")
    if path.name == index.NAME:
        return problems
    try:
        problems += _tensors(path, chunks)
    except Exception as cause:  # the file is damaged in a way that its reader cannot describe better
        problems.append(f"{path.name} cannot be read: {cause}")
    return problems


def _tensors(path: Path, chunks: list[tuple[Chunk, Entry]]) -> Iterator[str]:
    with tensorfile.opened(path) as file:
        keys = set(file.keys())
        expected = {chunk.key for chunk, _ in chunks}
        yield from (f"{path.name}: tensor {key} is missing" for key in sorted(expected - keys))
        yield from (f"{path.name}: tensor {key} is not in the index" for key in sorted(keys - expected))
        for chunk, entry in chunks:
            if chunk.key not in keys:
                continue
            try:
                numbers = stored(file, chunk, entry.dtype, path)
            except CheckpointError as error:
                yield f"{path.name}: {error.what}"
                continue
            if numbers.is_floating_point() and (bad := _not_finite(numbers)):
                yield f"{path.name}: {chunk.key} has {bad} numbers that are not finite"


def _not_finite(numbers: torch.Tensor) -> int:
    flat = numbers.reshape(-1)
    blocks = (flat[start : start + BLOCK_NUMBERS] for start in range(0, flat.numel(), BLOCK_NUMBERS))
    return sum(int((~torch.isfinite(block.float() if block.itemsize == 1 else block)).sum()) for block in blocks)


def _unlike_index(describe: Mapping[str, Any], entries: Mapping[str, Entry]) -> list[str]:
    held = {
        name.removeprefix("model."): {"shape": list(entry.shape), "dtype": entry.dtype}
        for name, entry in entries.items()
        if name.startswith("model.")
    }
    table = describe.get("model", {})
    return [
        f"{name}: {_kind(held.get(name))} in the index, {_kind(table.get(name))} in the manifest"
        for name in sorted(held.keys() | table.keys())
        if _kind(held.get(name)) != _kind(table.get(name))
    ]
