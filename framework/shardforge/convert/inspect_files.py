"""What the files of a checkpoint tell before any of them is taken for a model: who wrote it, in which layout, how much.

Names and small files are enough for that, so a damaged checkpoint is described as far as it is there.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.checkpoint import folders, index, tensorfile, tensorheader
from shardforge.core.errors import ForgeError
from shardforge.families.deepspeed_files import ZERO, UniversalFolder
from shardforge.families.deepspeed_partitions import PartitionFolder
from shardforge.families.gguf_file import GgufFile
from shardforge.families.huggingface import CONFIG
from shardforge.families.linked import Tensors
from shardforge.families.megatron_dist import COMMON, METADATA, DistFolder
from shardforge.families.pickles import read_saved
from shardforge.families.shardforge import RunSource
from shardforge.families.source import Info
from shardforge.families.tensorfolder import STORED, read_json

RANK = {
    "shardforge": re.compile(r"rank-(\d+)(?:-\d+)?\.safetensors"),
    "megatron": re.compile(r"__(\d+)_\d+\.distcp"),
    "deepspeed": re.compile(r".*zero_pp_rank_(\d+)_mp_rank_\d+_(?:optim|model)_states\.pt"),
}
"""Files that name the rank that wrote them."""
DEEP = ("megatron", "deepspeed")
"""Kinds with folders inside."""
LEGACY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
MODEL_RANK = re.compile(r".*mp_rank_(\d+)_(?:optim|model)_states\.pt")
DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data_parallel_size",
}
"""Axes in the arguments of Megatron."""


@dataclass(frozen=True)
class Laid:
    """How a checkpoint lies on the disk."""

    files: Mapping[str, int]  # name -> bytes, of all that belong to it
    program: str = ""  # what wrote it, as far as it says so
    ranks: int | None = None  # processes that wrote it
    layout: Mapping[str, int] = field(default_factory=dict)  # axis -> ranks, as the files or their settings say
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.files.values())


def laid(kind: str, path: Path) -> Laid:
    """`kind` as in `families.open.KINDS`, or "safetensors". `path` is what is opened: a folder, or one file."""
    below = path.rglob("*") if kind in DEEP else path.iterdir() if path.is_dir() else [path]
    files = {(each.relative_to(path).as_posix() if each != path else each.name): each for each in sorted(below)}
    sizes = {name: each.stat().st_size for name, each in files.items() if each.is_file()}
    ranks = {int(hit[1]) for name in sizes if kind in RANK and (hit := RANK[kind].fullmatch(Path(name).name))}
    try:
        told = TELL[kind](path, sizes) if kind in TELL else {}
    except ForgeError:
        told = {}  # whoever opens the checkpoint tells what is wrong with it
    return Laid(sizes, **{"ranks": len(ranks) or None, **told})


def _run(path: Path, _: Mapping[str, int]) -> dict[str, Any]:
    torch = folders.read_manifest(path).get("describe", {}).get("torch")
    return {"program": f"torch {torch}" if torch else ""}


def _published(path: Path, _: Mapping[str, int]) -> dict[str, Any]:
    version = read_json(path / CONFIG).get("transformers_version")
    return {"program": f"transformers {version}" if version else ""}


def _megatron(path: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Degrees from the arguments, or from the names of folders of ranks."""
    ranks = [tuple(int(each or 0) for each in hit.groups()) for each in path.iterdir() if (hit := _legacy(each))]
    if ranks:
        tp, pp, ep = (max(rank[axis] for rank in ranks) + 1 for axis in range(3))
        return {"program": "a file for each rank", "ranks": len(ranks), "layout": {"tp": tp, "pp": pp, "ep": ep}}
    saved = read_saved(path / COMMON) if (path / COMMON).is_file() else {}
    kept = saved.get("args") if isinstance(saved, Mapping) else None
    args = vars(kept) if isinstance(kept, argparse.Namespace) else {}
    degrees = {axis: args.get(name) for axis, name in DEGREES.items()}
    known = {axis: degree for axis, degree in degrees.items() if type(degree) is int}
    world = args.get("world_size")
    notes = (f"trained by {world} ranks",) if type(world) is int else ()
    return {"program": "torch_dist", "layout": known, "notes": notes}


def _legacy(path: Path) -> re.Match[str] | None:
    return LEGACY.fullmatch(path.name) if path.is_dir() else None


def _deepspeed(path: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    tensor = {int(hit[1]) for name in sizes if (hit := MODEL_RANK.fullmatch(name))}
    partitions = {int(hit[1]) for name in sizes if (hit := RANK["deepspeed"].fullmatch(name))}
    if (path / ZERO).is_dir():
        return {"program": "universal", "ranks": None}
    if any("zero_pp_rank_" in name and name.endswith("_model_states.pt") for name in sizes):
        stage = "ZeRO 3"
    else:
        stage = "ZeRO 1 or 2" if partitions else "no ZeRO"
    layout = {"tp": len(tensor), "dp": len(partitions)} if partitions else {"tp": len(tensor)}
    return {"program": stage, "layout": layout}


def _gguf(path: Path, _: Mapping[str, int]) -> dict[str, Any]:
    file = GgufFile(path)
    types = Counter(slot.type for slot in file.stored.values())
    said = [f"{key}: {file.said[f'general.{key}']}" for key in GENERAL if file.said.get(f"general.{key}")]
    stored = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    return {"program": f"version {file.version}", "notes": (*said, f"tensors as stored: {stored}")}


GENERAL = ("name", "organization", "author", "quantized_by", "license")
TELL: dict[str, Callable[[Path, Mapping[str, int]], dict[str, Any]]] = {
    "shardforge": _run,
    "huggingface": _published,
    "megatron": _megatron,
    "deepspeed": _deepspeed,
    "gguf": _gguf,
}


class Loose:
    """See `families.linked.Tensors`. Safetensors files whatever they are of; `problems` tells of those that cannot be
    read, the others are there."""

    def __init__(self, path: Path):
        self.path = path
        self.names: dict[str, Info] = {}
        self.problems: list[str] = []
        self._files: dict[str, Path] = {}
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            try:
                self._enter(file)
            except ForgeError as error:
                self.problems.append(f"{file.name}: {error.what}")

    def read(self, name: str) -> Tensor:
        with tensorfile.opened(self._files[name]) as file:
            return file.get_tensor(name)

    def _enter(self, file: Path) -> None:
        for name, slot in tensorheader.header(file).items():
            if slot.dtype not in STORED:
                self.problems.append(f"{file.name}: {name} has the type {slot.dtype}, which is not read")
            elif name in self.names:
                self.problems.append(f"{file.name}: {name} is in {self._files[name].name} too")
            else:
                self.names[name], self._files[name] = Info(slot.shape, STORED[slot.dtype]), file


class Step(RunSource):
    """See `families.linked.Tensors`. What the index of a step folder of ours names, model and optimizer; the folder
    may be torn, or without its recipe."""

    def __init__(self, path: Path):
        self.path = path
        self._entries = index.read(path)
        files = {chunk.file for entry in self._entries.values() for chunk in entry.chunks}
        self.problems = [f"{name} is missing" for name in sorted(files) if not (path / name).is_file()]
        self.names = {name: Info(entry.shape, entry.dtype) for name, entry in self._entries.items()}

    def read(self, name: str) -> Tensor:
        return self._read(name)


def stored(kind: str, path: Path) -> Tensors | None:
    """The tensors under the names that they have in the files, for a checkpoint that cannot be opened as a model.

    ForgeError when not even that can be read; None when no file of tensors is there.
    """
    if kind == "shardforge" and (path / index.NAME).is_file():
        return Step(path)
    if kind in ("shardforge", "huggingface", "safetensors"):
        return Loose(path)
    if kind == "gguf":
        return GgufFile(path)
    if kind == "deepspeed":
        return UniversalFolder(path) if (path / ZERO).is_dir() else PartitionFolder(path)
    if kind == "megatron" and (path / METADATA).is_file():
        return DistFolder(path, {})
    return None
