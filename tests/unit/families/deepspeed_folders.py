"""Folders as DeepSpeed writes them, made by hand of whole tensors: name -> kind ("" for the weight) -> tensor."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Whole = Mapping[str, Mapping[str, Tensor]]
STEP = 5
MODULE = "deepspeed.utils.tensor_fragment"


@dataclass
class fragment_address:
    numel: int
    start: int


fragment_address.__module__ = MODULE


def numbers(shapes: Mapping[str, Sequence[int]], kinds: Sequence[str] = ("", "exp_avg", "exp_avg_sq")) -> Whole:
    chance = torch.Generator().manual_seed(len(shapes))
    return {
        name: {kind: torch.randn(tuple(shape), generator=chance) for kind in kinds} for name, shape in shapes.items()
    }


def saved(path: Path, content: Any) -> None:
    """torch.save, in a process that has the module of DeepSpeed that the pickle names, and nothing else of it."""
    modules = {name: types.ModuleType(name) for name in ("deepspeed", "deepspeed.utils", MODULE)}
    vars(modules[MODULE])["fragment_address"] = fragment_address
    with mock.patch.dict(sys.modules, modules):
        torch.save(content, path)


def states(whole: Sequence[Whole], **beside: Any) -> dict[str, Any]:
    """What model_states says of parameter groups."""
    shapes = [{name: kinds[""].shape for name, kinds in group.items()} for group in whole]
    return {"module": {}, "param_shapes": shapes, "global_steps": STEP, "shared_params": {}, **beside}


def zero12(path: Path, groups: Sequence[Whole], ranks: int, **beside: Any) -> Path:
    """Weights of a group lie behind one another, cut into equal parts of which the last ones are filled up."""
    path.mkdir(parents=True)
    saved(path / "mp_rank_00_model_states.pt", states(groups, **beside))
    for rank in range(ranks):
        flats, base, slices = [], {}, []
        for at, group in enumerate(groups):
            size = sum(kinds[""].numel() for kinds in group.values())
            width, start = ceil(size / ranks), 0
            place = {}
            for name, kinds in group.items():
                first, last = max(start, rank * width), min(start + kinds[""].numel(), (rank + 1) * width)
                if first < last:
                    place[name] = fragment_address(last - first, first - rank * width)
                start += kinds[""].numel()
            flat = {kind: _filled(group, kind, width * ranks)[rank * width : (rank + 1) * width] for kind in kinds}
            flats.append(flat.pop(""))
            base[at] = {"step": torch.tensor(float(STEP)), **flat}
            slices.append(place)
        inner = {
            "single_partition_of_fp32_groups": flats,
            "base_optimizer_state": {"state": base, "param_groups": [{"params": [at]} for at in base]},
            "param_slice_mappings": slices,
            "partition_count": [ranks] * len(groups),
        }
        saved(path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": inner})
    return path


def zero3(path: Path, groups: Sequence[Whole], ranks: int, **beside: Any) -> Path:
    """Each weight is cut into equal parts, of which the last ones are filled up."""
    path.mkdir(parents=True)
    for rank in range(ranks):
        saved(path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", states(groups, **beside))
        flats, base = [], {}
        for at, group in enumerate(groups):
            kinds = next(iter(group.values()))
            parts: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
            for of_one in group.values():
                width = ceil(of_one[""].numel() / ranks)
                for kind, tensor in of_one.items():
                    whole = torch.cat([tensor.flatten(), torch.full((width * ranks - tensor.numel(),), 9.0)])
                    parts[kind].append(whole[rank * width : (rank + 1) * width])
            flat = {kind: torch.cat(of_kind) for kind, of_kind in parts.items()}
            flats.append(flat.pop(""))
            base[at] = {"step": torch.tensor(float(STEP)), **flat}
        inner = {
            "fp32_flat_groups": flats,
            "optimizer_state_dict": {"state": base, "param_groups": [{"params": list(base)}]},
            "partition_count": ranks,
        }
        saved(path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": inner})
    return path


def universal(path: Path, whole: Whole, **beside: Any) -> Path:
    (path / "zero").mkdir(parents=True)
    saved(path / "mp_rank_00_model_states.pt", states([whole], **beside))
    for name, kinds in whole.items():
        (path / "zero" / name).mkdir()
        for kind, tensor in kinds.items():
            torch.save({"cat_dim": 0, "param": tensor}, path / "zero" / name / f"{kind or 'fp32'}.pt")
        torch.save(torch.tensor(float(STEP)), path / "zero" / name / "step.pt")
    return path


def _filled(group: Whole, kind: str, size: int) -> Tensor:
    flat = torch.cat([kinds[kind].flatten() for kinds in group.values()])
    return torch.cat([flat, torch.full((size - flat.numel(),), 9.0)])
