"""Weights and optimizer states in the folders that DeepSpeed writes. Nothing of DeepSpeed is imported.

ZeRO 1, 2   global_step9/mp_rank_00_model_states.pt and [bf16_]zero_pp_rank_0_mp_rank_00_optim_states.pt of each rank
ZeRO 3      global_step9/zero_pp_rank_0_mp_rank_00_model_states.pt and ..._optim_states.pt of each rank
universal   global_step9_universal/zero/model.norm.weight/{fp32,exp_avg,exp_avg_sq,step}.pt, and the first model_states
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.pickles import distrusted, read_saved
from shardforge.families.source import Info

SHOWN = 60
LATEST = ("latest", "latest_universal")
ZERO, WEIGHT, STEP, GLOBAL = "zero", "fp32", "step", "optimizer_state.pt"
MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<tensor>\d+)_model_states\.pt")
INNER = "optimizer_state_dict"
AGAIN = "copy it from where the checkpoint was saved"
UNIVERSAL = "convert it with `python -m deepspeed.checkpoint.ds_to_universal` and name the result"
UNLIKE = "it does not hold what DeepSpeed writes"
CLIENT = "shardforge"
"""Key of the client state under which a checkpoint that ShardForge wrote keeps recipe, model and position."""
TABLES = ("module", "shared_params", "frozen_param_shapes", CLIENT)
"""What of a model_states is a mapping, or nothing."""
Shape = tuple[int, ...]


def step_folder(path: Path) -> Path | None:
    """The folder of one step that `path` is, or the one that it names as its latest; None when it is neither."""
    for name in LATEST:
        if (path / name).is_file():
            told = (path / name).read_text(errors="replace").strip()
            if Path(told).name != told or not os.path.isdir(path / told):  # which takes any text
                what = f"{name} names {told[:SHOWN]!r}, and it is not there"
                raise CheckpointError(what, path, "name the folder of a step")
            path = path / told
            break
    return path if any(each.name.endswith("_model_states.pt") for each in path.iterdir()) else None


class UniversalFolder:
    """See `families.linked.Tensors`; `state` is what the first model_states says beside the weights."""

    def __init__(self, path: Path):
        self.path = path
        self.state = next(iter(model_states(path, whole=True).values()))
        self.names: dict[str, Info] = {}
        with distrusted(path, UNLIKE):
            self._enter()

    def _enter(self) -> None:
        path, told = self.path, shapes(self.state)
        kinds: dict[str, set[str]] = {}
        copies = self.state.get("shared_params") or {}
        for folder in sorted(each for each in (path / ZERO).iterdir() if (each / f"{WEIGHT}.pt").is_file()):
            if folder.name not in copies:
                weight = _param(folder / f"{WEIGHT}.pt")
                shape = told.get(folder.name, tuple(weight.shape))
                self.names[folder.name] = Info(shape, number_type(weight, folder.name, path))
                kinds[folder.name] = {file.stem for file in folder.glob("*.pt")} - {WEIGHT}
        if not self.names:
            raise CheckpointError(f"there is no {WEIGHT}.pt in any folder of it", path / ZERO, AGAIN)
        self.moments, self.counts = self._kept(kinds)

    def read(self, name: str) -> Tensor:
        return self._read(name, WEIGHT)

    def read_moment(self, kind: str, name: str) -> Tensor:
        if kind == STEP:
            own = self.path / ZERO / name / f"{STEP}.pt"
            with distrusted(own, UNLIKE):
                return torch.as_tensor(read_saved(own) if own.is_file() else self._step)
        return self._read(name, kind)

    def _read(self, name: str, kind: str) -> Tensor:
        file = self.path / ZERO / name / f"{kind}.pt"
        if not file.is_file():
            raise CheckpointError(f"there is no {kind} of {name}", file, AGAIN)
        found, shape = _param(file), self.names[name].shape
        if found.numel() != prod(shape):
            raise CheckpointError(f"{found.numel()} numbers are here, {name} {list(shape)} has {prod(shape)}", file)
        return found.reshape(shape)

    def _kept(self, kinds: Mapping[str, set[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Kinds of moments and of counts, which every weight has that has any."""
        updated = {name: of_one for name, of_one in kinds.items() if of_one}
        every = set().union(*updated.values())
        lost: list[ForgeError] = [
            CheckpointError(f"{kind}.pt is missing", self.path / ZERO / name, AGAIN)
            for name, of_one in updated.items()
            for kind in sorted(every - of_one)
        ]
        if lost:
            raise Problems(lost, f"the optimizer's state in {self.path}")
        self._step = self._common_step() if updated and STEP not in every else None
        counted = STEP in every or self._step is not None
        return tuple(sorted(every - {STEP})), (STEP,) if counted else ()

    def _common_step(self) -> Any:
        """The one step of all weights, where the result of ZeRO 3 keeps it."""
        if not (self.path / ZERO / GLOBAL).is_file():
            return None
        inner = read_saved(self.path / ZERO / GLOBAL).get(INNER) or {}
        return next((each[STEP] for each in (inner.get("state") or {}).values() if STEP in each), None)


def _param(file: Path) -> Tensor:
    """The tensor in a file of a universal checkpoint."""
    found = read_saved(file)
    found = found.get("param") if isinstance(found, Mapping) else found
    if not isinstance(found, Tensor):
        raise CheckpointError("there is no tensor in it", file, AGAIN)
    return found.detach()


def shapes(state: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the weights that the optimizer updates. ValueError for what is no shape."""
    found = {name: tuple(shape) for group in state.get("param_shapes") or () for name, shape in group.items()}
    for name, shape in found.items():
        if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"param_shapes says {name!r}: {shape}")
    return found


def number_type(tensor: Tensor, name: str, path: Path) -> str:
    """Our word for the type of a tensor. CheckpointError for one that no weight of ours has."""
    told = type_name(tensor.dtype)
    if told not in TYPES:
        raise CheckpointError(f"{name} holds numbers of type {told}, which are not read", path, "save it as float32")
    return told


def model_states(path: Path, whole: bool = False) -> dict[int, dict[str, Any]]:
    """What each rank says beside the optimizer's state; of a universal checkpoint (`whole`) the first alone."""
    files = ranked(path, MODEL, whole)
    found = {}
    for rank, file in sorted(files.items())[: 1 if whole else None]:
        found[rank] = state = read_saved(file)
        if not isinstance(state, dict) or type(state.get("global_steps")) is not int:
            raise CheckpointError("this does not say what a checkpoint of DeepSpeed says (global_steps)", file, AGAIN)
        if odd := [key for key in TABLES if not isinstance(state.get(key) or {}, Mapping)]:
            what = f"{odd[0]} is a {type(state[odd[0]]).__name__}, where DeepSpeed has a table"
            raise CheckpointError(what, file, AGAIN)
    if 0 not in found:
        raise CheckpointError("mp_rank_00_model_states.pt of rank 0 is missing", path, AGAIN)
    return found


def ranked(path: Path, names: re.Pattern[str], whole: bool = False) -> dict[int, Path]:
    """The files of each data parallel rank. CheckpointError for weights cut in other ways."""
    hits = [(hit, file) for file in sorted(path.iterdir()) if (hit := names.fullmatch(file.name))]
    if not whole and any(int(hit["tensor"]) for hit, _ in hits):
        raise CheckpointError("the ranks had parts of the model itself (tensor or pipeline parallel)", path, UNIVERSAL)
    if any(file.name.startswith("layer_") for file in path.glob("*_model_states.pt")):
        raise CheckpointError("layers or experts lie in files of their own (layer_*)", path, UNIVERSAL)
    return {int(hit["rank"] or 0): file for hit, file in reversed(hits)}
