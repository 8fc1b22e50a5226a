"""A folder with config.json and safetensors files, as Hugging Face publishes models, as a source of weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError
from shardforge.families.family import Family, families
from shardforge.families.linked import LinkedSource, Tensors
from shardforge.families.section import tied as is_tied
from shardforge.families.section import whole
from shardforge.families.settings import Settings
from shardforge.families.source import CODE, Beside, Extract, Info, astray, belonging, linked_away
from shardforge.families.table import Row
from shardforge.families.tensorfolder import INDEX, WHOLE, TensorFolder, read_json

CONFIG = "config.json"
CERTIFICATE = "conversion.json"  # of the conversion that made the folder
WEIGHTS, SHOWN = ".safetensors", 6
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HuggingFaceSource(LinkedSource):
    """See `families.source.Source`. Problems or CheckpointError say what the folder lacks; nothing is pickled here."""

    def __init__(self, path: Path):
        config = path / CONFIG
        settings = Settings(read_json(config), config)
        family = family_of(settings)
        tensors = _Named(_decoded(TensorFolder(path), family, settings), family)
        model, absent = model_of(family, settings, tensors.names)
        spare = [*family.spare]
        if is_tied(model) and family.tied in tensors.names:
            check_tied(tensors, family, family.table(model))
            spare.append(family.tied.replace(".", r"\."))
        table, idle = family.table(model), re.compile("|".join(f"(?:{each})" for each in spare) or r"(?!)")
        beside = beside_of(settings, absent, [name for name in tensors.names if idle.fullmatch(name)])
        beside = replace(beside, unread=(*beside.unread, *_others(path, beside.tokenizer)))
        super().__init__(tensors, model, table, origin=config, spare=spare, beside=beside)


def family_of(settings: Settings) -> Family:
    """The family of config.json's architecture; CheckpointError listing the known ones when it is none of them."""
    known, named = families(), _architecture(settings)
    if named is not None:
        return known[named]
    raise CheckpointError(
        f"architectures={settings.get('architectures', [])} is not one that can be read",
        settings.path,
        f"known are {', '.join(known)}; a new one is a file in families/kinds",
    )


def _architecture(settings: Settings) -> str | None:
    known = families()
    return next((each for each in map(str, settings.get("architectures", [])) if each in known), None)


def model_of(family: Family, settings: Settings, names: Mapping[str, Info]) -> tuple[dict[str, Any], list[str]]:
    """The whole model section that the tensors called `names` are of, and its fields that they lack. Problems with all
    of config.json that cannot be said."""
    told = family.model(settings)
    settings.settle()
    said = whole(told, settings.path)
    model = family.present(said, names) if family.present else said
    return model, [field for field, value in said.items() if value is not None and model[field] is None]


def _decoded(folder: TensorFolder, family: Family, settings: Settings) -> Tensors:
    """The tensors as the weights they stand for. What the family cannot decode is noted in the settings."""
    if family.decoded is not None:
        return family.decoded(folder, settings)
    settings.unknown(
        ["quantization_config"], "quantised weights are not read; save the model dequantised and name that folder"
    )
    return folder


class _Named:
    """Tensors of a folder with the prefix that some files of a family leave out."""

    def __init__(self, folder: Tensors, family: Family):
        self.path, self._folder = folder.path, folder
        self._real = {self._full(name, family, folder.names): name for name in folder.names}
        self.names: dict[str, Info] = {name: folder.names[real] for name, real in self._real.items()}

    def read(self, name: str) -> Tensor:
        return self._folder.read(self._real[name])

    def _full(self, name: str, family: Family, names: Iterable[str]) -> str:
        """`name` as the family's table has it."""
        bare = not any(each.startswith(family.optional) for each in names)
        return f"{family.optional}{name}" if family.optional and bare and name != family.tied else name


def check_tied(tensors: Tensors, family: Family, table: Sequence[Row]) -> None:
    """A head that config.json calls tied must be a copy of the embedding, or the settings lie."""
    (name,) = (row.theirs[0] for row in table if row.ours == ("embed.{leaf}",))
    embedding = name.format(leaf="weight")
    if embedding in tensors.names and not torch.equal(tensors.read(family.tied), tensors.read(embedding)):
        raise CheckpointError(
            f"{family.tied} differs from {embedding}, but config.json says tie_word_embeddings: true",
            tensors.path,
            "write tie_word_embeddings: false into config.json if the head is its own",
        )


def beside_of(settings: Settings, absent: Sequence[str] = (), idle: Sequence[str] = ()) -> Beside:
    """What config.json says beside the model, the fields that have no weights, and the files that lie with it. `idle`
    are tensors that are no weights of their own."""
    text = settings.get("text_config", {})  # where a model has more than a language model in it
    said = settings.changed({key: value for key, value in text.items() if settings.get(key) is None})
    length = said.get("max_position_embeddings", said.get("n_positions"))
    tokens = {key: said.get(key) for key in TOKENS if said.get(key) is not None}
    unread = [*settings.notes]
    unread += [f"{CONFIG} speaks of {field}, of which there are no weights" for field in absent]
    if idle:
        more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        unread.append(f"{idle[0]}{more}: copies, or tables that the model makes itself")
    if quantised := settings.get("quantization_config"):
        method = quantised.get("quant_method")
        unread.append(f"how weights were quantised ({method}): they are read as the numbers that they stand for")
    folder = settings.path.parent
    unread += linked_away(folder)
    return Beside(
        length=length,
        tokens=tokens,
        tokenizer=belonging(folder),
        architecture=_architecture(settings),
        unread=tuple(unread),
    )


def _others(folder: Path, taken: Sequence[Path | Extract]) -> Iterator[str]:
    """What else lies there, in a line or two."""
    known = {CONFIG, WHOLE, INDEX, CERTIFICATE, *(file.name for file in (*taken, *astray(folder)))}
    found = sorted(file for file in folder.iterdir() if file.name not in known and not file.name.startswith("."))
    code = [file.name for file in found if file.suffix == CODE]
    rest = [f"{file.name}/" if file.is_dir() else file.name for file in found if file.suffix not in (CODE, WEIGHTS)]
    if code:
        yield f"{_few(code)}: code, which is never copied; what needs it has to be told where it is"
    if rest:
        yield f"{_few(rest)}: neither weights nor of a tokenizer that is known"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
