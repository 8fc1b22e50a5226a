"""Weights and optimizer states as the ranks of ZeRO 1, 2 and 3 keep them: parts of all weights in flat tensors.

The optimizer's files hold flat float32 tensors, a part of each weight on each rank, and padding behind them. Weights
that it does not update, buffers and second names lie in `module` of the model_states, in the type they are computed in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.families.deepspeed_files import AGAIN, INNER, STEP, UNLIKE, model_states, number_type, ranked, shapes
from shardforge.families.pickles import distrusted, read_saved
from shardforge.families.source import Info

OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<tensor>\d+)_optim_states\.pt")
FLAT12, FLAT3, SLICES = "single_partition_of_fp32_groups", "fp32_flat_groups", "param_slice_mappings"


class PartitionFolder:
    """See `families.linked.Tensors`. Parts of all ranks are mapped from their files and joined when they are read."""

    def __init__(self, path: Path):
        self.path = path
        models = model_states(path)
        self.state = models[0]
        self.names: dict[str, Info] = {}
        self._parts: dict[str, dict[str, list[Tensor]]] = {"": {}}  # kind -> name -> what the ranks have of it
        self._steps: dict[str, Any] = {}
        with distrusted(path, UNLIKE):
            self._take(models, self._optim())
            self._enter(models)
            self.moments = tuple(sorted(kind for kind in self._parts if kind))
        self.counts = (STEP,) if self._steps else ()

    def _take(self, models: Mapping[int, Mapping[str, Any]], ranks: Mapping[int, Mapping[str, Any]]) -> None:
        """Note the parts of all weights that each rank has."""
        for rank, optim in ranks.items():
            if FLAT3 in optim:
                if len(models) != len(ranks):
                    what = f"{len(models)} of {len(ranks)} files *_model_states.pt are here"
                    raise CheckpointError(what, self.path, AGAIN)
                pieces = _pieces3(optim, models[rank], rank, len(ranks))
            else:
                pieces = _pieces12(optim, self.path)
            for kind, name, part in pieces:
                if kind == STEP:
                    self._steps[name] = part
                else:
                    self._parts.setdefault(kind, {}).setdefault(name, []).append(part)

    def read(self, name: str) -> Tensor:
        return self._join("", name)

    def read_moment(self, kind: str, name: str) -> Tensor:
        known: Mapping[str, Any] = self._steps if kind == STEP else self._parts.get(kind, {})
        if name not in known:
            raise CheckpointError(f"there is no {kind} of {name}", self.path, "drop the moments")
        if kind != STEP:
            return self._join(kind, name)
        with distrusted(self.path, UNLIKE):
            return torch.as_tensor(self._steps[name])

    def _join(self, kind: str, name: str) -> Tensor:
        with distrusted(self.path, UNLIKE):
            return torch.cat([each.flatten() for each in self._parts[kind][name]]).reshape(self.names[name].shape)

    def _optim(self) -> dict[int, dict[str, Any]]:
        """What the optimizer kept, by rank; {} for a training without ZeRO."""
        files = ranked(self.path, OPTIM)
        found = {}
        for rank, file in sorted(files.items()):
            saved = read_saved(file)
            if not isinstance(saved, Mapping) or not isinstance(saved.get(INNER), Mapping):
                raise CheckpointError(f"there is no {INNER!r} in it", file, AGAIN)
            found[rank] = saved[INNER]
        told = [optim.get("partition_count") for optim in found.values()]
        wanted = max((max(each) if isinstance(each, Sequence) else each or 0 for each in told), default=0)
        if missing := wanted - sum(rank < wanted for rank in found):
            first = next(rank for rank in range(wanted) if rank not in found)
            what = f"{missing} of the files of {wanted} ranks are missing, *_optim_states.pt of rank {first}"
            raise CheckpointError(f"{what} first", self.path, AGAIN)
        return found

    def _enter(self, models: Mapping[int, Mapping[str, Any]]) -> None:
        """Give each tensor its name, and see that every number of it is there."""
        known = shapes(self.state)
        copies = self.state.get("shared_params") or {}
        frozen = self.state.get("frozen_param_shapes") or {}
        for name, tensor in (self.state.get("module") or {}).items():
            if name in known or name in copies or not isinstance(name, str) or not isinstance(tensor, Tensor):
                continue
            if name in frozen and tensor.numel() == 0:  # in parts on all ranks
                whole = torch.cat([models[rank]["frozen_param_fragments"][name].flatten() for rank in sorted(models)])
                tensor = whole[: prod(frozen[name])].reshape(tuple(frozen[name]))
            known[name] = tuple(tensor.shape)
            self._parts[""][name] = [tensor.detach()]
        problems: list[ForgeError] = []
        for name, shape in known.items():
            for kind in self._parts:
                parts = self._parts[kind].get(name, [])
                here = sum(part.numel() for part in parts)
                if here != prod(shape) and (parts or not kind):
                    full = f"{kind} of {name}" if kind else name
                    what = f"{here} of {prod(shape)} numbers of {full} {list(shape)} are there"
                    problems.append(CheckpointError(what, self.path, AGAIN))
            if self._parts[""].get(name):
                self.names[name] = Info(shape, number_type(self._parts[""][name][0], name, self.path))
        if problems:
            raise Problems(problems, f"the weights in {self.path}")


def _pieces12(optim: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, part) of one rank; weights lie behind one another in the flat tensor of their group."""
    if SLICES not in optim or FLAT12 not in optim:
        what = "it was saved without ZeRO 1 to 3, or by a DeepSpeed that did not tell where weights lie (before 0.7)"
        raise CheckpointError(what, path, "load it with a newer one, and save it again")
    groups, states = optim[FLAT12], _states(optim["base_optimizer_state"], len(optim[FLAT12]))
    for flat, state, slices in zip(groups, states, optim[SLICES], strict=True):
        for name, place in slices.items():
            yield from _cut(flat, state, name, place.start, place.numel)


def _pieces3(
    optim: Mapping[str, Any], model: Mapping[str, Any], rank: int, ranks: int
) -> Iterator[tuple[str, str, Any]]:
    """The same of ZeRO 3: every rank has an equal part of each weight, the last ones filled up."""
    groups, states = optim[FLAT3], _states(optim[INNER], len(optim[FLAT3]))
    for flat, state, group in zip(groups, states, model["param_shapes"], strict=True):
        start = 0
        for name, shape in group.items():
            width = ceil(prod(shape) / ranks)
            yield from _cut(flat, state, name, start, max(0, min(width, prod(shape) - rank * width)))
            start += width


def _states(base: Any, groups: int) -> list[Mapping[str, Any]]:
    """What the inner optimizer keeps for the flat tensor of each group; {} before its first step."""
    if not isinstance(base, Mapping):
        return list(base)
    steps = [STEP in each and {STEP: each[STEP]} for each in base["param_groups"]]
    common = next((each for each in steps if each), {})
    return [{**common, **base["state"].get(at, {})} for at in range(groups)]


def _cut(flat: Tensor, state: Mapping[str, Any], name: str, start: int, numel: int) -> Iterator[tuple[str, str, Any]]:
    whole = {str(kind): each for kind, each in state.items() if isinstance(each, Tensor) and each.dim()}
    for kind, tensor in {"": flat, **whole}.items():
        yield kind, name, tensor.detach()[start : start + numel]
    if state.get(STEP) is not None:
        yield STEP, name, state[STEP]
