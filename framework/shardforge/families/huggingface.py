"""A folder with config.json and safetensors files, as Hugging Face publishes models, as a source of weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError
from shardforge.families.family import Family, families
from shardforge.families.linked import LinkedSource
from shardforge.families.settings import Settings
from shardforge.families.source import Info
from shardforge.families.tensorfolder import TensorFolder, read_json

CONFIG = "config.json"


class HuggingFaceSource(LinkedSource):
    """See `families.source.Source`. Problems or CheckpointError say what the folder lacks; nothing is pickled here."""

    def __init__(self, path: Path):
        config = path / CONFIG
        settings = Settings(read_json(config), config)
        family = family_of(settings)
        settings.unknown(
            ["quantization_config"], "quantised weights are not read; save the model dequantised and name that folder"
        )
        tensors = _Named(TensorFolder(path), family)
        model = family.model(settings)
        settings.settle()
        spare = [*family.spare]
        if model["head"] == "tied" and family.tied in tensors.names:
            _check_tied(tensors, family)
            spare.append(family.tied.replace(".", r"\."))
        super().__init__(tensors, model, family.table, origin=config, spare=spare)


def family_of(settings: Settings) -> Family:
    """The family of config.json's architecture; CheckpointError listing the known ones when it is none of them."""
    known = families()
    named = settings.get("architectures") or []
    for architecture in named:
        if architecture in known:
            return known[architecture]
    raise CheckpointError(
        f"architectures={named} is not one that can be read",
        settings.path,
        f"known are {', '.join(known)}; a new one is a file in families/kinds",
    )


class _Named:
    """Tensors of a folder with the prefix that some files of a family leave out."""

    def __init__(self, folder: TensorFolder, family: Family):
        self.path, self._folder = folder.path, folder
        self._real = {self._full(name, family, folder.names): name for name in folder.names}
        self.names: dict[str, Info] = {name: folder.names[real] for name, real in self._real.items()}

    def read(self, name: str) -> Tensor:
        return self._folder.read(self._real[name])

    def _full(self, name: str, family: Family, names: Iterable[str]) -> str:
        """`name` as the family's table has it."""
        bare = not any(each.startswith(family.optional) for each in names)
        return f"{family.optional}{name}" if family.optional and bare and name != family.tied else name


def _check_tied(tensors: _Named, family: Family) -> None:
    """A head that config.json calls tied must be a copy of the embedding, or the settings lie."""
    (table,) = (row.theirs[0] for row in family.table if row.ours == ("embed.{leaf}",))
    embedding = table.format(leaf="weight")
    if embedding in tensors.names and not torch.equal(tensors.read(family.tied), tensors.read(embedding)):
        raise CheckpointError(
            f"{family.tied} differs from {embedding}, but config.json says tie_word_embeddings: true",
            tensors.path,
            "write tie_word_embeddings: false into config.json if the head is its own",
        )
