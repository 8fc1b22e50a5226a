"""A folder as Hugging Face publishes models: safetensors files, their index, config.json and the tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import Part
from shardforge.convert import tokenizer
from shardforge.convert.design import dropped, items, no_layout, sharded, types
from shardforge.convert.format import File, Options
from shardforge.core.errors import CheckpointError
from shardforge.families.huggingface import CONFIG, TOKENS
from shardforge.families.publish import publish
from shardforge.families.source import Source
from shardforge.families.statemap import StateMap
from shardforge.families.tensorfolder import INDEX, WHOLE

NAME = "huggingface"
HELP = "config.json and safetensors files; loads in transformers"
HEADER = {"format": "pt"}
"""transformers refuses a file that does not say so."""
LENGTH = "max_position_embeddings"
SHOWN = 6


@dataclass(frozen=True)
class Folder:
    """See `convert.format.Writer`."""

    files: tuple[File, ...]
    left: tuple[str, ...]
    config: dict[str, Any]
    generation: dict[str, Any]  # what generation_config.json says where the source has none
    beside: tokenizer.Files

    def write(self, path: Path, parts: Sequence[Part]) -> dict[str, Any]:
        return vars(tensorfile.write_tensors(path, parts, HEADER))

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        tokenizer.copy(self.beside, folder)
        if not (folder / tokenizer.GENERATION).exists():
            _write(folder / tokenizer.GENERATION, self.generation)
        if len(self.files) > 1:
            places = {item.key: file.name for file in self.files for item in file.items}
            size = sum(file.bytes for file in self.files)
            _write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
        _write(folder / CONFIG, self.config)

    def opened(self, folder: Path) -> Path:
        return folder


def design(source: Source, options: Options) -> Folder:
    """See `convert.format.Format`."""
    no_layout(options, "a Hugging Face folder")
    said = publish(source.model, source.path, source.beside.architecture)
    shapes = {name: info.shape for name, info in source.names.items()}
    table = StateMap(said.family.table(source.model), shapes)
    if table.unnamed:
        more = f" and {len(table.unnamed) - SHOWN} more" if len(table.unnamed) > SHOWN else ""
        what = f"{said.config['architectures'][0]} has no name for {', '.join(table.unnamed[:SHOWN])}{more}"
        raise CheckpointError(what, source.path, "report this: the family's table is not whole")
    dtypes = types(source, options)
    planned = sharded((item for group in table.groups for item in items(group, dtypes, source)), options.shard_bytes)
    names = [WHOLE] if len(planned) == 1 else [_name(at, len(planned)) for at in range(len(planned))]
    files = tuple(File(name, tuple(batch)) for name, batch in zip(names, planned, strict=True))
    config, left = config_json(said.config, source, files)
    generation = {"_from_model_config": True, **source.beside.tokens}
    left += [*said.left, *dropped(source, options, "a Hugging Face folder")]
    return Folder(files, tuple(left), config, generation, tokenizer.chosen(source, options))


def config_json(said: dict[str, Any], source: Source, files: Sequence[File]) -> tuple[dict[str, Any], list[str]]:
    """config.json with what is not the model's: type, length and special tokens; and what of it nobody knows."""
    sizes: Counter[str] = Counter()
    for item in (item for file in files for item in file.items):
        sizes[item.dtype] += item.bytes
    config = {**said, "torch_dtype": sizes.most_common(1)[0][0], **dict.fromkeys(TOKENS), **source.beside.tokens}
    left: list[str] = []
    length = source.beside.length
    if LENGTH not in config and "n_positions" not in config:
        if length is not None:
            config[LENGTH] = length
        else:
            left.append(f"{LENGTH} of config.json: nothing says which lengths the weights are made for")
    return config, left


def _name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write(path: Path, content: Mapping[str, Any]) -> None:
    tensorfile.write_whole(path, json.dumps(content, indent=2).encode() + b"\n")
