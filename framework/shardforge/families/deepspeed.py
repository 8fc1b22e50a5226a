"""A training of DeepSpeed as a source of weights and of what its optimizer kept, whatever its stage of ZeRO was.

Weights have the names of the module that was trained: those of the model's family as transformers has them, or ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.core.errors import CheckpointError
from shardforge.core.rundir import RunDir
from shardforge.families.deepspeed_files import CLIENT, STEP, ZERO, UniversalFolder
from shardforge.families.deepspeed_partitions import PartitionFolder
from shardforge.families.family import Family
from shardforge.families.huggingface import CONFIG, beside_of, check_tied, family_of, model_of
from shardforge.families.linked import LinkedSource
from shardforge.families.publish import publish
from shardforge.families.section import config, whole
from shardforge.families.section import tied as is_tied
from shardforge.families.settings import Settings
from shardforge.families.source import BARE, Beside, Info
from shardforge.families.statemap import StateMap
from shardforge.families.table import Row
from shardforge.families.tensorfolder import read_json
from shardforge.families.trained import trained
from shardforge.model.build import build
from shardforge.recipe.load import load
from shardforge.recipe.provenance import plain

OURS = (Row(("{name}",), ("{name}",)),)
WRAPPERS = ("", "module.", "model.", "_orig_mod.")
OWN = (
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params", "lr_scheduler"),
    *("frozen_param_fragments", "data_sampler", "random_ltd", "skipped_steps", "global_steps", "global_samples"),
    *("dp_world_size", "mp_world_size", "checkpoint_parallel_dimensions", "ds_config", "ds_version"),
    *("universal_checkpoint_info", "num_experts", "ds_autoep_layers", CLIENT),
)
"""Keys of a model_states that are no client state of the user's."""
MODEL_FIX = f"put the model's {CONFIG} or recipe.yaml beside it, or name it with --config"


class DeepSpeedSource(LinkedSource):
    """See `families.source.Source`. `path` is the folder of one step. The weights are the optimizer's float32 ones.

    What model it is says `described`, a config.json, a recipe or a folder with one; without it what lies there itself.
    """

    def __init__(self, path: Path, described: Path | None = None):
        files = UniversalFolder(path) if (path / ZERO).is_dir() else PartitionFolder(path)
        told = _described(files, described)
        tensors, table, spare = _linked(files, told)
        beside = _beside(told, files)
        super().__init__(tensors, told.model, table, origin=told.origin, spare=spare, beside=beside)
        self._spelled = tensors
        self.moments, self.counts = files.moments, files.counts

    def read_moment(self, kind: str, name: str) -> Tensor:
        read = partial(self._spelled.read_moment, kind)
        return read(self.map.place(name)[0].theirs[0]) if kind in self.counts else self._made(name, read)


@dataclass(frozen=True)
class _Described:
    model: dict[str, Any]  # whole
    origin: Path
    family: Family | None = None  # that the words are of
    beside: Beside = BARE


class _Spelled:
    """Tensors under names without what something was wrapped in, and with what their family puts before them."""

    def __init__(self, files: UniversalFolder | PartitionFolder, wrapper: str = "", prefix: str = ""):
        self.path, self._files = files.path, files
        self._real = {prefix + name.removeprefix(wrapper): name for name in files.names}
        self.names: dict[str, Info] = {name: files.names[real] for name, real in self._real.items()}

    def read(self, name: str) -> Tensor:
        return self._files.read(self._real[name])

    def read_moment(self, kind: str, name: str) -> Tensor:
        return self._files.read_moment(kind, self._real[name])


def _described(files: UniversalFolder | PartitionFolder, told: Path | None) -> _Described:
    """What model it is: by the file that was named, by ShardForge's own note, or by a file beside it."""
    path, note = files.path, files.state.get(CLIENT) or {}
    if told is None and note.get("model"):
        return _Described(whole(note["model"], path), path, beside=_words(path))
    for place in [told] if told is not None else [path, path.parent]:
        for file in [place] if place.is_file() else [place / CONFIG, RunDir(place).recipe]:
            if file.is_file():
                return _published(file, files.names) if file.suffix == ".json" else _recipe(file)
    raise CheckpointError("nothing says what model this is: weights have names and shapes only", path, MODEL_FIX)


def _published(file: Path, names: Mapping[str, Info]) -> _Described:
    settings = Settings(read_json(file), file)
    family = family_of(settings)
    model, absent = model_of(family, settings, names)
    return _Described(model, file, family, beside_of(settings, absent))


def _recipe(file: Path) -> _Described:
    recipe = plain(load(file).recipe)
    return _Described(recipe["model"], file, beside=Beside(length=(recipe.get("train") or {}).get("seq_len")))


def _words(path: Path) -> Beside:
    """What a config.json beside our own checkpoint adds to it."""
    file = next((place / CONFIG for place in (path, path.parent) if (place / CONFIG).is_file()), None)
    return BARE if file is None else beside_of(Settings(read_json(file), file))


def _linked(
    files: UniversalFolder | PartitionFolder, told: _Described
) -> tuple[_Spelled, Sequence[Row], tuple[str, ...]]:
    """The tensors as the table spells them, the table, and patterns of tensors that are none of the model's weights.

    Of the names of ours and those of the family, each with and without a wrapper, the ones that hit the most.
    """
    built = build(config(told.model, told.origin), nn.Identity())
    weights = {name: tuple(each["shape"]) for name, each in state.table(built).items()}
    family = told.family or _family(told)
    tables: list[tuple[Sequence[Row], Family | None, tuple[str, ...]]] = [(OURS, None, ("",))]
    if family is not None:
        table, prefixes = family.table(told.model), tuple(dict.fromkeys(("", family.optional)))
        tables += [(table, family, prefixes), (trained(table), family, prefixes)]
    best: tuple[int, _Spelled, Sequence[Row], Family | None] | None = None
    for table, owner, prefixes in tables:
        wanted = {each for group in StateMap(table, weights).groups for each in group.theirs}
        for wrapper in WRAPPERS:
            for prefix in prefixes:
                spelled = _Spelled(files, wrapper, prefix)
                hits = len(wanted & spelled.names.keys())
                if hits and (best is None or hits > best[0]):
                    best = hits, spelled, table, owner
    if best is None:
        some = ", ".join(list(files.names)[:3])
        what = f"the weights ({some} ...) have neither the names of this model in {told.origin.name} nor ours"
        raise CheckpointError(what, files.path, "name the config.json of the model that was trained with --config")
    _, spelled, table, owner = best
    return spelled, table, _spare(spelled, table, owner, told.model)


def _spare(spelled: _Spelled, table: Sequence[Row], family: Family | None, model: Mapping[str, Any]) -> tuple[str, ...]:
    if family is None:
        return ()
    if not is_tied(model) or family.tied not in spelled.names:
        return family.spare
    check_tied(spelled, family, table)
    return (*family.spare, family.tied.replace(".", r"\."))


def _family(told: _Described) -> Family | None:
    try:
        return publish(told.model, told.origin, told.beside.architecture).family
    except CheckpointError:
        return None  # a model of ours alone has our names


def _beside(told: _Described, files: UniversalFolder | PartitionFolder) -> Beside:
    saved = files.state
    step, note = int(saved["global_steps"]), saved.get(CLIENT) or {}
    unread = [f"{key}: client state of the training script" for key in saved if key not in OWN]
    if saved.get("lr_scheduler") and not note:
        unread.append(f"lr_scheduler: where the learning rate was ({_short(saved['lr_scheduler'])})")
    if saved.get("data_sampler"):
        unread.append("data_sampler: which samples came already")
    if saved.get("ds_config"):
        unread.append(f"ds_config: {_short(saved['ds_config'])}")
    if saved.get("optimizer"):
        unread.append("optimizer: kept without ZeRO, where nothing says which weight each tensor belongs to")
    same = note.get(STEP) == step
    if note and not same:
        unread.append(f"recipe and data position: ShardForge wrote them at step {note.get(STEP)}, this is step {step}")
    recipe, extra = (note.get("recipe"), note.get("extra")) if same else (told.beside.recipe, told.beside.extra)
    length = told.beside.length or note.get("length")
    unread = [*told.beside.unread, *unread]
    return replace(told.beside, step=step, length=length, unread=tuple(unread), recipe=recipe, extra=extra)


def _short(value: Any) -> str:
    told = repr(value)
    return told if len(told) < 100 else f"{told[:100]}..."
