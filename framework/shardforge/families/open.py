"""A path becomes a source of weights: what lies there is recognised by its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shardforge.core.errors import CheckpointError
from shardforge.families import deepspeed_files, gguf, megatron_files, shardforge, tensorfolder
from shardforge.families.deepspeed import DeepSpeedSource
from shardforge.families.huggingface import CONFIG, HuggingFaceSource
from shardforge.families.megatron import MegatronSource
from shardforge.families.shardforge import RunSource
from shardforge.families.source import Source


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint that is read."""

    name: str
    title: str
    files: str  # by which it is recognised, for people
    find: Callable[[Path], Path | None]  # what of a path to open; None when it is not of this kind
    open: Callable[[Path], Source]


def _published(path: Path) -> Path | None:
    return path if path.is_dir() and (path / CONFIG).is_file() else None


def _partitions(path: Path) -> Path | None:
    """Of DeepSpeed; a folder that has the weights as safetensors too is one of Hugging Face."""
    return None if any(path.glob("*.safetensors")) else deepspeed_files.step_folder(path)


def _folder(find: Callable[[Path], Path | None]) -> Callable[[Path], Path | None]:
    return lambda path: find(path) if path.is_dir() else None


KINDS = (
    Kind("shardforge", "ShardForge", "a run or step folder", _folder(shardforge.step_folder), RunSource),
    Kind(
        "deepspeed",
        "DeepSpeed",
        "a folder global_step..., universal or not, or the one above it",
        _folder(_partitions),
        DeepSpeedSource,
    ),
    Kind("huggingface", "Hugging Face", "a folder with config.json and *.safetensors", _published, HuggingFaceSource),
    Kind(
        "megatron",
        "Megatron",
        "a folder iter_..., or the one above it",
        _folder(megatron_files.step_folder),
        MegatronSource,
    ),
    Kind("gguf", "GGUF", "a file *.gguf, or its folder", gguf.gguf_file, gguf.GgufSource),
)
NAMED = "; ".join(f"{kind.title}: {kind.files}" for kind in KINDS)


def recognised(path: Path) -> tuple[Kind, Path]:
    """Its kind, and what of it is opened: of a run the newest step. No number is read, and no more than a few bytes.

    CheckpointError for a path that is of no kind.
    """
    if not path.exists():
        raise CheckpointError("there is nothing here", path, f"name one of {NAMED}")
    if not path.is_dir() and not path.is_file():  # a device or a pipe, which may never end
        raise CheckpointError("this is neither a folder nor a regular file", path, f"name one of {NAMED}")
    try:
        for kind in KINDS:
            if found := kind.find(path):
                return kind, found
        raise _unknown(path)
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror}", path, "see whose it is, and on what disk") from cause


def open_source(path: Path, config: Path | None = None) -> Source:
    """The weights that lie there. `config` is a config.json, a recipe or a folder with one, for DeepSpeed's folders,
    which do not say what model they are of.

    CheckpointError for a path that is of no kind; Problems for a model whose weights are not all there.
    """
    kind, found = recognised(path)
    if config is None:
        return kind.open(found)
    if kind.open is not DeepSpeedSource:
        what = f"a checkpoint of {kind.title} says itself what model it is"
        raise CheckpointError(what, f"--config {config}", "leave it out")
    return DeepSpeedSource(found, config)


def _unknown(path: Path) -> CheckpointError:
    names = [path.name] if path.is_file() else sorted(each.name for each in path.iterdir())
    if pickled := [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]:
        return tensorfolder.refused(path, pickled[0])
    if path.is_file() and path.suffix == ".safetensors":
        what = "this is one file of tensors, which do not say what model they are of"
        return CheckpointError(what, path, f"name its folder, with a {CONFIG} in it")
    if tensors := [name for name in names if name.endswith(".safetensors")]:
        what = f"there is no {CONFIG} beside {tensors[0]}, so nothing says what model it is"
        return CheckpointError(what, path, f"put the {CONFIG} of the model there")
    what = "no weights are recognised in this file" if path.is_file() else "no weights are recognised here"
    return CheckpointError(what, path, f"name one of {NAMED}")
