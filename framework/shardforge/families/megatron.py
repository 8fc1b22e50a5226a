"""Models that Megatron-LM and megatron-core trained, as a source of weights and of what their optimizer kept.

Reference: megatron-core 0.16, GPTModel with local or Transformer Engine layers: dense or mixtures, grouped or latent
attention, windows, multi-token prediction. What the arguments of a training ask for beyond is refused by name.
Limits: of optimizers the checkpoints whose states have the shapes of the weights, which are those of
Float16OptimizerWithFloat16Params, of FP32Optimizer, and of DistributedOptimizer saved as `fully_reshardable`
(--dist-ckpt-optim-fully-reshardable); of the older format weights alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.kept import Kept, kept
from shardforge.families.linked import LinkedSource
from shardforge.families.megatron_args import same
from shardforge.families.megatron_dist import METADATA, DistFolder, arguments
from shardforge.families.megatron_files import LegacyFolder
from shardforge.families.megatron_model import model, vocabulary
from shardforge.families.megatron_names import table
from shardforge.families.section import whole
from shardforge.families.settings import Settings
from shardforge.families.source import Beside, belonging, linked_away

SCHEDULER = "opt_param_scheduler"
NOTE = "shardforge.json"
"""Beside the tensors: what ShardForge knows of the run, and the save of which it knows it."""
WORDS = "embedding.word_embeddings.weight"
COUNTS = ("step",)


class MegatronSource(LinkedSource):
    """See `families.source.Source`. `path` is the folder of one iteration, in either of Megatron's formats."""

    def __init__(self, path: Path):
        files = _files(path)
        common = files.common if isinstance(files, DistFolder) else {"args": files.settings}
        settings = Settings(arguments(common, path), path)
        told = model(settings)
        if isinstance(files, LegacyFolder) and not _kinds(told) <= {"gqa", "glu", "mlp"}:
            settings.wrong("mixtures and latent attention are not read of this format, save it as torch_dist")
        if settings.problems:
            raise Problems(settings.problems, str(path))
        found = whole(told, path)
        note = _note(path, files)
        recipe = note.get("recipe")
        if recipe and same(recipe["model"], found):
            found = recipe["model"]  # the same model in the words of its recipe
        elif recipe:
            recipe = None
        spare = [r"output_layer\.weight"] if found["head"]["kind"] == "tied" else []
        rows = files.names[WORDS].shape[0] if WORDS in files.names else vocabulary(settings)[1]
        beside = _beside(path, files, settings, note, recipe)
        super().__init__(files, found, table(found, rows), origin=path, spare=spare, beside=beside)
        self.common = common
        self._kept = _kept(files) if isinstance(files, DistFolder) else Kept()
        self.beside = replace(beside, unread=(*beside.unread, *self._kept.unread))
        self.moments = self._kept.moments
        self.counts = COUNTS if self.moments else ()

    def read_moment(self, kind: str, name: str) -> Tensor:
        """Problems where the checkpoint lacks some of what the optimizer kept."""
        self._kept.check(self.path)
        if kind in self.counts:
            return torch.tensor(float(step_of(self.common) or 0))
        files = self.tensors
        if isinstance(files, DistFolder) and self.map.place(name)[0].theirs[0] in files.kinds.get(kind, {}):
            return self._made(name, partial(files.read_kind, kind))
        return super().read_moment(kind, name)


def _kept(files: DistFolder) -> Kept:
    """Kinds of what the optimizer keeps for each tensor; single numbers it keeps once for all, beside them."""
    kinds = {kind: {name: info.shape for name, info in found.items()} for kind, found in files.kinds.items()}
    found = kept({name: info.shape for name, info in files.names.items()}, kinds)
    alone = (f"{kind}, which the optimizer kept: one number for a tensor" for kind in found.counts)
    return replace(found, counts=(), unread=(*found.unread, *alone))


def step_of(common: Mapping[str, Any]) -> float | None:
    """Updates that the optimizer has made, from what is kept beside the tensors; None where nothing says so."""
    queue: list[Any] = [common.get("optimizer")]
    while queue:
        found = queue.pop(0)
        if isinstance(found, Mapping):
            for key in ("common_step", "step"):
                if isinstance(found.get(key), int | float | Tensor):
                    return float(found[key])
            queue += [each for key, each in found.items() if key != "params"]
        elif isinstance(found, list | tuple):
            queue += list(found)
    return common.get("iteration")


def _files(path: Path) -> DistFolder | LegacyFolder:
    return DistFolder(path) if (path / METADATA).is_file() else LegacyFolder(path)


def _kinds(section: Mapping[str, Any]) -> set[str]:
    return {each[role]["kind"] for each in section["blocks"].values() for role in ("mixer", "ffn")}


def _note(path: Path, files: DistFolder | LegacyFolder) -> dict[str, Any]:
    """What ShardForge wrote beside this very save; {} where it wrote nothing, or Megatron has saved over it."""
    file = path / NOTE
    if not file.is_file() or not isinstance(files, DistFolder):
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as cause:
        raise CheckpointError(f"cannot be read: {cause}", file, "remove it, or copy it again") from cause
    return found if isinstance(found, dict) and found.get("save") == files.saved else {}


def _beside(
    path: Path, files: DistFolder | LegacyFolder, settings: Settings, note: Mapping[str, Any], recipe: Any
) -> Beside:
    common = files.common if isinstance(files, DistFolder) else {}
    told = common.get("iteration", getattr(common.get("args"), "iteration", None))
    step = int(told) if isinstance(told, int) and told > 0 else None
    folder = path if belonging(path) else path.parent
    return Beside(
        step=note.get("step", step),
        recipe=recipe,
        extra=note.get("extra") if recipe else None,
        length=note.get("length") or settings.get("max_position_embeddings"),
        tokens=note.get("tokens") or {},
        architecture=note.get("architecture"),
        tokenizer=belonging(folder),
        unread=(*_unread(path, files, settings, not note), *linked_away(folder)),
    )


def _unread(path: Path, files: DistFolder | LegacyFolder, settings: Settings, foreign: bool) -> list[str]:
    """What is there and cannot be taken along."""
    lines = []
    if isinstance(files, LegacyFolder):
        lines.append("what the optimizer kept: it is not read of the older format, save it as torch_dist")
    elif "optimizer" in files.common and not files.kinds:
        lines.append("what the optimizer kept: its shards can only be read as --dist-ckpt-optim-fully-reshardable")
    if (path / NOTE).is_file() and foreign:
        lines.append(f"{NOTE}: it belongs to an earlier save in this folder")
    if foreign and isinstance(files, DistFolder):
        if SCHEDULER in files.common:
            lines.append(f"{SCHEDULER}: no field of a recipe, only another Megatron checkpoint gets it")
        lines += ["rng_state: random numbers of other devices"] if files.random else []
    if foreign and settings.get("attention_dropout"):
        lines.append(f"attention_dropout={settings.get('attention_dropout')}: there is none on scores")
    return lines
