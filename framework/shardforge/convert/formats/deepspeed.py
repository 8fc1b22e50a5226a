"""A universal checkpoint of DeepSpeed, with which a training goes on at any stage of ZeRO and any number of ranks.

Reference: DeepSpeed 0.19, which reads the folder when its config says `checkpoint: {load_universal: true}`.
Weights have the names of the module that is trained: transformers' (`families.trained`) where a published family says
the model, else ours. Limits of DeepSpeed: it loads no buffers from such a checkpoint; weights without moments load at
ZeRO 3 with `load_module_only=True` alone; and at ZeRO 3 with several parameter groups it counts the step of Adam once
for each of them, in universal checkpoints of its own too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.convert import tokenizer
from shardforge.convert.design import counted, items, kept, no_layout, updated
from shardforge.convert.format import File, Options
from shardforge.convert.formats.huggingface import config_json
from shardforge.convert.hashed import Hashed
from shardforge.core.errors import CheckpointError
from shardforge.families.deepspeed import CLIENT, OURS
from shardforge.families.deepspeed_files import GLOBAL, INNER, LATEST, STEP, WEIGHT, ZERO
from shardforge.families.huggingface import CONFIG
from shardforge.families.publish import Published, publish
from shardforge.families.source import Source
from shardforge.families.statemap import StateMap
from shardforge.families.trained import trained
from shardforge.recipe.load import from_mapping

NAME = "deepspeed"
HELP = "a universal checkpoint; DeepSpeed goes on with it at any ZeRO stage and number of ranks"
VERSION = "0.19.8"
"""Of the DeepSpeed whose files these are like; a reader refuses a checkpoint without one."""
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.4}}
STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""The same twice: ZeRO 3 looks for another name than 1 and 2."""


@dataclass(frozen=True)
class Universal:
    """See `convert.format.Writer`."""

    files: tuple[File, ...]
    left: tuple[str, ...]
    step: int  # of the training
    count: float | None  # steps that the optimizer counted; None for weights without moments
    samples: int
    rate: float | None  # learning rate of the next step, where the recipe says it
    shapes: dict[str, tuple[int, ...]]  # of the tensors that an optimizer updates
    note: dict[str, Any]
    config: dict[str, Any] | None
    beside: tokenizer.Files

    def write(self, path: Path, parts: Sequence[Part]) -> dict[str, Any]:
        (part,) = parts
        tensor = part.read().detach()
        if tensor.untyped_storage().nbytes() != part.bytes:
            tensor = tensor.clone()  # torch.save writes all that a view is a part of
        with Hashed(path) as hashed:
            hashed.save({"cat_dim": 0, "param": tensor})
        return {"bytes": hashed.size, "sha256": hashed.digest.hexdigest()}

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        place = self.opened(folder)
        if self.count is not None:
            count = _saved(torch.tensor(self.count, dtype=torch.float32))
            for name in self.shapes:
                tensorfile.write_whole(place / ZERO / name / f"{STEP}.pt", count)
        tensorfile.write_whole(place / ZERO / GLOBAL, _saved(self._optimizer()))
        states = _saved(self._states())
        for name in STATES:
            tensorfile.write_whole(place / name, states)
        if self.config is not None:
            text = json.dumps(self.config, indent=2) + "\n"
            tensorfile.write_whole(folder / CONFIG, text.encode())
        tokenizer.copy(self.beside, folder)
        tensorfile.write_whole(folder / LATEST[1], place.name.encode())

    def opened(self, folder: Path) -> Path:
        return folder / _tag(self.step)

    def _optimizer(self) -> dict[str, Any]:
        """What is not of one weight. The engine takes the first of these groups for its own first, and so on, so there
        are as many as it can have; what they do not say, its config does."""
        said = {} if self.rate is None else {"lr": self.rate}
        groups = [{"params": [at], **said} for at in range(len(self.shapes))]
        state = {0: {STEP: torch.tensor(self.count or 0.0, dtype=torch.float32)}}
        return {"ds_version": VERSION, "param_groups": groups, INNER: {"state": state, "param_groups": groups}}

    def _states(self) -> dict[str, Any]:
        # DeepSpeed's schedules read the first number, torch's the others
        position = {"last_batch_iteration": self.step - 1, "last_epoch": self.step, "_step_count": self.step + 1}
        absent = dict.fromkeys(("optimizer", "frozen_param_shapes", "frozen_param_fragments", "data_sampler"))
        return {
            **absent,
            **UNIVERSAL,
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: torch.Size(shape) for name, shape in self.shapes.items()}],
            "shared_params": {},
            "lr_scheduler": {**position, "lr_lambdas": []},
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self.step,
            "global_samples": self.samples,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_config": {},
            "ds_version": VERSION,
            CLIENT: self.note,
        }


def design(source: Source, options: Options) -> Universal:
    """See `convert.format.Format`."""
    no_layout(options, "a universal checkpoint")
    if options.dtype not in ("source", "fp32"):
        what = f"a universal checkpoint holds the optimizer's float32 weights, not {options.dtype}"
        raise CheckpointError(what, "--dtype", "leave it out; what DeepSpeed computes in says its config")
    said, left = _published(source)
    table = StateMap(trained(said.family.table(source.model)) if said else OURS, _shapes(source))
    if table.unnamed:
        what = f"the published family has no name for {', '.join(table.unnamed[:6])}"
        raise CheckpointError(what, source.path, "report this: the family's table is not whole")
    dtypes = {name: _wide(info.dtype) for name, info in source.names.items()}
    kinds, weights = kept(source, options), set(updated(source))
    step, files, shapes = source.beside.step or 0, [], {}
    for group in table.groups:
        moved = weights.issuperset(group.ours)
        for kind in ("", *(kinds if moved else ())):
            for item in items(group, dtypes, source, kind) if kind not in source.counts else ():
                place, stem = f"{_tag(step)}/{ZERO}/{item.key}", kind or WEIGHT
                files.append(File(f"{place}/{stem}.pt", (replace(item, key=f"{item.key}.{stem}"),)))
                if moved:
                    shapes[item.key] = item.shape
    count = counted(source, sorted(weights), "DeepSpeed") if kinds else None
    config, unknown = config_json(said.config, source, files) if said else (None, [])
    recipe = from_mapping(source.beside.recipe).recipe if source.beside.recipe else None
    return Universal(
        files=tuple(files),
        left=(*left, *unknown, *_left(source, options, set(source.names) - weights)),
        step=step,
        count=count,
        samples=step * recipe.train.sequences if recipe else 0,
        rate=float(recipe.schedule.at(step, recipe.train.steps)) if recipe else None,
        shapes=shapes,
        note=_note(source, step),
        config=config,
        beside=tokenizer.chosen(source, options),
    )


def _published(source: Source) -> tuple[Published | None, list[str]]:
    """The family whose names the weights get, and what to say when there is none."""
    try:
        said = publish(source.model, source.path, source.beside.architecture)
        return said, list(said.left)
    except CheckpointError as error:
        return None, [f"published names, so the weights have ShardForge's: {error.what.splitlines()[0]}"]


def _left(source: Source, options: Options, buffers: set[str]) -> list[str]:
    lines = []
    if source.moments and options.moments == "drop":
        lines.append(f"what the optimizer kept ({', '.join((*source.moments, *source.counts))}): --moments drop")
    if buffers:
        told = ", ".join(sorted(buffers)[:3]) + (" ..." if len(buffers) > 3 else "")
        lines.append(f"for DeepSpeed, which loads no buffers: {told}; they lie there for other readers")
    if source.beside.recipe is not None:
        lines.append("for DeepSpeed, betas, weight decay and schedule: its own config says them; the recipe goes along")
    if source.beside.extra:
        lines.append("for DeepSpeed, the position in the data and the state of chance: they go along for the way back")
    return lines


def _note(source: Source, step: int) -> dict[str, Any]:
    """What the way back needs, as plain data."""
    beside = source.beside
    told = {STEP: step, "model": source.model, "recipe": beside.recipe, "extra": beside.extra, "length": beside.length}
    return json.loads(json.dumps(told))


def _tag(step: int) -> str:
    return f"global_step{step}_universal"


def _shapes(source: Source) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in source.names.items()}


def _wide(dtype: str) -> str:
    return "float32" if TYPES[dtype][0].is_floating_point else dtype


def _saved(found: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(found, stream)
    return stream.getvalue()
