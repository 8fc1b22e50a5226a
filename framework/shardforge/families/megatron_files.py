"""The folders that Megatron-LM writes, and the tensors in the older of the two kinds. Nothing of Megatron is imported.

torch_dist   iter_0001000/.metadata, __0_0.distcp ..., common.pt    see megatron_dist
torch        iter_0001000/mp_rank_00/model_optim_rng.pt ...         one pickle a tp (and pp) rank
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import type_name
from shardforge.core.errors import CheckpointError
from shardforge.families.megatron_dist import METADATA
from shardforge.families.megatron_names import FC1, HALF, OURS, common_name
from shardforge.families.pickles import read_saved
from shardforge.families.source import Info

LATEST, PICKLE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt"
SHOWN = 80
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
ALONG_ROWS = re.compile(r".*(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)")
ALONG_COLUMNS = re.compile(r".*(linear_proj|linear_fc2)\.weight")


def step_folder(path: Path) -> Path | None:
    """The folder of one iteration that `path` is, or the latest one that it names; None when it is neither."""
    latest = path / LATEST
    if latest.is_file():
        told = latest.read_text(errors="replace").strip()[:SHOWN]
        path = path / (f"iter_{int(told):07d}" if told.isdecimal() else told)
        if Path(told).name != told or not os.path.isdir(path):  # which takes any text
            raise CheckpointError(f"{LATEST} names {told!r}, and it is not there", path.parent, "name its folder")
    known = (path / METADATA).is_file() or any(RANK.fullmatch(each.name) for each in path.iterdir())
    return path if known else None


class LegacyFolder:
    """See `families.linked.Tensors`. Shards of tp ranks are joined, layers of pp ranks numbered on.

    Names are those of `megatron_names`. Dense models with attention of heads alone: what a rank of ep, or of a latent
    attention, has of a weight is not known here.
    """

    def __init__(self, path: Path):
        self.path = path
        ranks = {tuple(int(n or 0) for n in found.groups()): found[0] for found in map(_rank, path.iterdir()) if found}
        tensor, stage = (max(rank[axis] for rank in ranks) + 1 for axis in (0, 1))
        if missing := [rank for rank in ((t, p) for p in range(stage) for t in range(tensor)) if rank not in ranks]:
            what = f"{len(missing)} of {tensor} x {stage} folders (tp x pp) are missing, first rank {missing[0]}"
            raise CheckpointError(what, path, "copy them from where the checkpoint was saved")
        self.settings: Any = None
        self.names: dict[str, Info] = {}
        self._shards: dict[str, list[Tensor]] = {}
        first = 0
        for p in range(stage):
            parts = [self._part(path / ranks[t, p] / PICKLE) for t in range(tensor)]
            self._enter(parts, first)
            first += 1 + max((int(found[1]) for found in map(LAYER.fullmatch, parts[0]) if found), default=-1)

    def read(self, name: str) -> Tensor:
        half = HALF.fullmatch(name) if name not in self._shards else None
        if half is None:
            return self._join(name, self._shards[name])
        return self._join(half[1], self._shards[half[1]]).chunk(2, 0)["wv".index(half[2])]

    def _part(self, file: Path) -> dict[str, Tensor]:
        """The model of one rank, its tensors mapped from the file."""
        saved = read_saved(file)
        if not isinstance(saved, Mapping) or not isinstance(saved.get("model"), Mapping):
            raise CheckpointError(
                "there is no 'model' in it; virtual pipeline stages are not read", file, "save it as torch_dist"
            )
        self.settings = self.settings or saved.get("args")
        return {name: t for name, t in saved["model"].items() if isinstance(t, Tensor) and OURS.fullmatch(name)}

    def _enter(self, parts: Sequence[Mapping[str, Tensor]], first: int) -> None:
        """Note the weights of one pipeline stage, whose layers are numbered from `first` on."""
        for name in parts[0]:
            found = LAYER.fullmatch(name)
            full = common_name(f"decoder.layers.{int(found[1]) + first}.{found[2]}" if found else name)
            if full in self._shards:
                continue  # the last stage's copy of a tied embedding
            self._shards[full] = [part[name] for part in parts]
            shape = tuple(
                self._join(full, [torch.empty_like(each, device="meta") for each in self._shards[full]]).shape
            )
            dtype = type_name(parts[0][name].dtype)
            if self._gated and FC1.fullmatch(full):
                half = Info((shape[0] // 2, *shape[1:]), dtype)
                self.names |= {f"{full}_w": half, f"{full}_v": half}
            else:
                self.names[full] = Info(shape, dtype)

    def _join(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        if ALONG_COLUMNS.fullmatch(name):
            return torch.cat(list(shards), 1)
        if not ALONG_ROWS.fullmatch(name):
            return shards[0]
        if self._gated and FC1.fullmatch(name):
            halves = [each.chunk(2, 0) for each in shards]  # each rank has its part of the gate, then of the other
            return torch.cat([half for side in (0, 1) for half in (pair[side] for pair in halves)], 0)
        return torch.cat(list(shards), 0)

    @property
    def _gated(self) -> bool:
        return bool(getattr(self.settings, "swiglu", False))


def _rank(path: Path) -> re.Match[str] | None:
    return RANK.fullmatch(path.name)
