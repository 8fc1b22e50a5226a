"""A path becomes a source of weights: what lies there is recognised by its files."""

from __future__ import annotations

from pathlib import Path

from shardforge.core.errors import CheckpointError
from shardforge.families import megatron_files, shardforge
from shardforge.families.huggingface import CONFIG, HuggingFaceSource
from shardforge.families.megatron import MegatronSource
from shardforge.families.shardforge import RunSource
from shardforge.families.source import Source

KINDS = (
    "a Hugging Face folder (config.json and *.safetensors), a Megatron folder (iter_..., or the one above it), or a "
    "ShardForge run or step folder"
)


def open_source(path: Path) -> Source:
    """The weights of a Hugging Face, Megatron or ShardForge folder; of a run the newest step.

    CheckpointError for a path that is none of them; Problems for a model whose weights are not all there.
    """
    if not path.exists():
        raise CheckpointError("there is nothing here", path, f"name {KINDS}")
    if not path.is_dir():
        raise CheckpointError("this is a file", path, f"name {KINDS}")
    if folder := shardforge.step_folder(path):
        return RunSource(folder)
    if (path / CONFIG).is_file():
        return HuggingFaceSource(path)
    if folder := megatron_files.step_folder(path):
        return MegatronSource(folder)
    raise CheckpointError("no weights are recognised here", path, f"name {KINDS}")
