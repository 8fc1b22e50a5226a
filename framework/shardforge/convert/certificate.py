"""conversion.json: what a conversion read, what it wrote, how one became the other, and what proves it.

identity   what the bytes depend on: path, files and fingerprint of the source, options, version
tool       versions of what wrote it
source     path, format, step, config that said its model; files with their bytes; digest of all hashes in `weights`
target     format; path of what `open_source` opens inside the folder; its files with bytes and sha256
model      the model section of a recipe that both are
changes    how many tensors were renamed, joined, cast, ...
weights    "model.NAME" or "optim.NAME.KIND" -> type, shape, sha256 of our numbers as they were read from the source
tensors    a list: file, key, type, shape, sha256 of the bytes as they were written; which weights, form, cast
odd        weight or key of a tensor -> how many numbers are not finite, where any are
left       what of the source is not in the target, a line each
proof      see `convert.proof.Proof`
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

import shardforge
from shardforge.checkpoint import tensorfile
from shardforge.convert import tokenizer
from shardforge.convert.format import File, Item, Options, Writer
from shardforge.convert.pieces import label
from shardforge.core.errors import CheckpointError
from shardforge.families.forms import SAME, Chain, Form, Reversed
from shardforge.families.linked import LinkedSource
from shardforge.families.source import Source

NAME = "conversion.json"
WORDS = {
    "Turned": ("transposed", "transposed"),
    "Rows": ("joined", "cut apart"),
    "Alternating": ("interleaved", "cut apart"),
    "QueryGroups": ("joined by group", "cut apart by group"),
    "Stacked": ("split by expert", "stacked"),
    "Paired": ("rotary rows paired", "rotary rows halved"),
    "Padded": ("padded", "cut to size"),
    "Copies": ("copied", "taken once"),
}
"""What a form does to weights of ours on their way to them, and on their way back."""


def collect(
    source: Source, writer: Writer, records: Sequence[Mapping[str, Any]], folder: Path, options: Options
) -> dict[str, Any]:
    """The certificate without `identity` and `proof`. CheckpointError when a weight that was read twice differed."""
    weights: dict[str, str] = {}
    for record in records:
        for name, digest in record["weights"].items():
            if weights.setdefault(name, digest) != digest:
                raise CheckpointError(f"{name} changed while it was read", source.path, "leave the source alone")
    tensors = [
        tensor
        for file, record in zip(writer.files, records, strict=True)
        for tensor in _tensors(file, record["tensors"], source)
    ]
    read = {name: _weight(name, digest, source) for name, digest in weights.items()}
    return {
        "tool": {"name": "shardforge", "version": shardforge.__version__, "torch": torch.__version__},
        "source": {
            "path": str(source.path.resolve()),
            "format": format_of(source),
            "step": source.beside.step,
            "config": str(options.config) if options.config else None,
            "files": {name: size for name, (size, _) in files(source.path).items()},
            "digest": hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest(),
        },
        "target": {
            "format": options.to,
            "opens": str(writer.opened(folder).relative_to(folder)),
            "files": dict(_written(folder, records)),
        },
        "model": source.model,
        "changes": dict(Counter(_changes(read, tensors))),
        "weights": read,
        "tensors": tensors,
        "odd": {name: count for record in records for name, count in record["odd"].items()},
        "left": [*source.beside.unread, *writer.left, *tokenizer.left(source, options)],
    }


def save(folder: Path, found: Mapping[str, Any]) -> None:
    tensorfile.write_whole(folder / NAME, json.dumps(found, indent=1).encode() + b"\n")


def read(folder: Path) -> dict[str, Any]:
    """The certificate of a folder. CheckpointError when there is none that can be read."""
    path = folder / NAME
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as cause:
        raise CheckpointError("this folder has no certificate", path, "name what `shardforge convert` made") from cause
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"the certificate cannot be read: {cause}", path, "convert again") from cause
    if not isinstance(found, dict) or "identity" not in found:
        raise CheckpointError("this is no certificate of a conversion", path, "convert again")
    return found


def format_of(source: Source) -> str:
    """ "huggingface", "shardforge", ...: the module that reads it."""
    return type(source).__module__.rpartition(".")[2]


def kinds(found: Mapping[str, Any]) -> set[str]:
    """What of an optimizer was carried, "exp_avg" and the like."""
    return {name.rpartition(".")[2] for name in found["weights"] if name.startswith("optim.")}


def cast(found: Mapping[str, Any]) -> bool:
    """Whether weights have another number type than in the source."""
    return any(tensor["cast"] for tensor in found["tensors"])


def changed(folder: Path, found: Mapping[str, Any]) -> list[str]:
    """Files of the certificate that are gone or have another size, a line each."""
    there = {name: size for name, (size, _) in files(folder).items()}
    return [
        f"{name} is gone" if name not in there else f"{name} has {there[name]} bytes, {file['bytes']} were written"
        for name, file in found["target"]["files"].items()
        if there.get(name) != file["bytes"]
    ]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> bytes and time of the last change, of every file below a folder; of a file, of itself."""
    found = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    stats = {path: path.stat() for path in found if path.is_file()}
    return {
        path.relative_to(folder).as_posix() if path != folder else path.name: (stat.st_size, stat.st_mtime_ns)
        for path, stat in stats.items()
    }


def words(form: Form, way: Literal["theirs", "ours"] = "theirs") -> list[str]:
    """What a form does to our weights on their way to them or back, in the order in which it does it."""
    if isinstance(form, Chain):
        inner = form.forms if way == "ours" else reversed(form.forms)
        return [word for each in inner for word in words(each, way)]
    if isinstance(form, Reversed):
        return words(form.form, "theirs" if way == "ours" else "ours")
    name = type(form).__name__
    return [] if form == SAME else [WORDS.get(name, (name.lower(),) * 2)[way == "ours"]]


def _tensors(file: File, hashes: Mapping[str, str], source: Source) -> Iterator[dict[str, Any]]:
    for item in file.items:
        yield {
            "file": file.name,
            "key": item.key,
            "dtype": item.dtype,
            "shape": item.shape,
            "sha256": hashes[item.key],
            "ours": [label(name, item.kind) for name in item.ours],
            "part": item.part,
            "form": words(item.form),
            "cast": _cast(item, source),
        }


def _cast(item: Item, source: Source) -> str | None:
    """ "float32" for a weight that was one and is no more."""
    if item.kind:
        return None
    was = source.names[item.ours[0]].dtype
    return was if was != item.dtype else None


def _changes(weights: Mapping[str, Mapping[str, Any]], tensors: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A word for each thing that was done to a tensor: on the way to our names, and from there to theirs."""
    for name, weight in weights.items():
        if weight.get("from", [name]) not in ([name], [name.removeprefix("model.")]):
            yield "renamed"
        yield from weight.get("form", ())
    for tensor in tensors:
        if [tensor["key"]] != tensor["ours"]:
            yield "renamed"
        yield from tensor["form"]
        if tensor["cast"]:
            yield f"cast {tensor['cast']} to {tensor['dtype']}"


def _weight(name: str, digest: str, source: Source) -> dict[str, Any]:
    """Of weights also type, shape, and which tensors of the source they were made of, how; what the optimizer keeps
    for one is as long as it."""
    part, _, rest = name.partition(".")
    if part != "model":
        return {"sha256": digest}
    info = source.names[rest]
    told: dict[str, Any] = {"dtype": info.dtype, "shape": info.shape, "sha256": digest}
    if isinstance(source, LinkedSource):
        group, _ = source.map.place(rest)
        told |= {"from": list(group.theirs), "form": words(group.form, "ours")}
    return told


def _written(folder: Path, records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All files of the result: those of jobs as they were written, the others as they are."""
    known = {file["file"]: file for record in records for file in record["files"]}
    for name, (size, _) in files(folder).items():
        if name != NAME:
            told = known.get(name)
            yield name, {"bytes": size, "sha256": told["sha256"] if told else tensorfile.sha256(folder / name)}
