"""Tensors and settings in the two kinds of folders that Megatron-LM writes. Nothing of Megatron is imported.

torch_dist   iter_0001000/.metadata, __0_0.distcp ..., common.pt    whole tensors in pieces, layers stacked
torch        iter_0001000/mp_rank_00/model_optim_rng.pt ...         one pickle a tp (and pp) rank
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.core.errors import CheckpointError
from shardforge.families.pickles import read_pickle, read_saved, read_stream
from shardforge.families.source import Info

LATEST, METADATA, COMMON, PICKLE = "latest_checkpointed_iteration.txt", ".metadata", "common.pt", "model_optim_rng.pt"
RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
OURS = re.compile(r"(embedding|decoder|output_layer)\..*")  # of the model, not of an optimizer
STACKED = re.compile(r"decoder\.layers\.(?!\d)(.*)")
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
LOCAL = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Names of norms where they are modules of their own -> where the matmul behind them holds them."""
ALONG_ROWS = re.compile(r".*(word_embeddings|output_layer|linear_qkv|linear_fc1)\.(weight|bias)")
ALONG_COLUMNS = re.compile(r".*(linear_proj|linear_fc2)\.weight")


def step_folder(path: Path) -> Path | None:
    """The folder of one iteration that `path` is, or the latest one that it names; None when it is neither."""
    latest = path / LATEST
    if latest.is_file():
        told = latest.read_text().strip()
        path = path / (f"iter_{int(told):07d}" if told.isdecimal() else told)
        if Path(told).name != told or not path.is_dir():
            raise CheckpointError(f"{LATEST} names {told!r}, and it is not there", path.parent, "name its folder")
    known = (path / METADATA).is_file() or any(RANK.fullmatch(each.name) for each in path.iterdir())
    return path if known else None


def common_name(name: str) -> str:
    """The one name of a weight that two kinds of Megatron's layers name differently."""
    for alone, fused in LOCAL.items():
        name = name.replace(alone, fused)
    return name


class DistFolder:
    """See `families.linked.Tensors`. A torch.distributed checkpoint; a stacked weight is one weight for each layer."""

    def __init__(self, path: Path):
        self.path = path
        read: Any = read_pickle(path / METADATA)
        if not isinstance(read, Metadata) or not isinstance(read.storage_data, Mapping):
            raise CheckpointError("this is no torch.distributed checkpoint", path / METADATA, "copy it again")
        self._metadata = read
        self.settings = self._args()
        self.names: dict[str, Info] = {}
        self._where: dict[str, tuple[str, int | None]] = {}  # name -> theirs, and the layer inside of it
        for name, entry in read.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and OURS.fullmatch(name):
                self._enter(name, tuple(entry.size), type_name(entry.properties.dtype))

    def read(self, name: str) -> Tensor:
        theirs, layer = self._where[name]
        info = self.names[name]
        whole = torch.empty(info.shape, dtype=TYPES[info.dtype][0])
        for chunk in self._metadata.state_dict_metadata[theirs].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if layer is not None:
                if not offsets[0] <= layer < offsets[0] + sizes[0]:
                    continue
                numbers = self._chunk(theirs, offsets)[layer - offsets[0]]
                offsets, sizes = offsets[1:], sizes[1:]
            else:
                numbers = self._chunk(theirs, offsets)
            whole[tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))] = numbers
        return whole

    def _enter(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        stacked = STACKED.fullmatch(name)
        if stacked is None:
            self.names[common_name(name)], self._where[common_name(name)] = Info(shape, dtype), (name, None)
            return
        for layer in range(shape[0]):
            alone = common_name(f"decoder.layers.{layer}.{stacked[1]}")
            self.names[alone], self._where[alone] = Info(shape[1:], dtype), (name, layer)

    def _chunk(self, name: str, offsets: tuple[int, ...]) -> Tensor:
        found = self._metadata.storage_data.get(MetadataIndex(name, offsets))
        if found is None or Path(found.relative_path).name != found.relative_path or found.transform_descriptors:
            raise CheckpointError(f"{name} at {list(offsets)} is not in a file that can be read", self.path, "copy it")
        file = self.path / found.relative_path
        if not file.is_file():
            raise CheckpointError(f"{file.name} is missing", self.path, "copy it from where the checkpoint was saved")
        with file.open("rb") as opened:
            opened.seek(found.offset)
            return read_stream(io.BytesIO(opened.read(found.length)), file)

    def _args(self) -> Any:
        common = self.path / COMMON
        return read_saved(common).get("args") if common.is_file() else None


class LegacyFolder:
    """See `families.linked.Tensors`. Shards of tp ranks are joined, layers of pp ranks numbered on."""

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
        return self._join(name, self._shards[name])

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
            shape = self._join(full, [torch.empty_like(each, device="meta") for each in self._shards[full]]).shape
            self.names[full] = Info(tuple(shape), type_name(parts[0][name].dtype))

    def _join(self, name: str, shards: Sequence[Tensor]) -> Tensor:
        if len(shards) == 1:
            return shards[0]
        if ALONG_COLUMNS.fullmatch(name):
            return torch.cat(list(shards), 1)
        if not ALONG_ROWS.fullmatch(name):
            return shards[0]
        if ".linear_fc1." in name and getattr(self.settings, "swiglu", False):
            halves = [each.chunk(2, 0) for each in shards]  # each rank has its part of the gate, then of the other
            return torch.cat([half for side in (0, 1) for half in (pair[side] for pair in halves)], 0)
        return torch.cat(list(shards), 0)


def _rank(path: Path) -> re.Match[str] | None:
    return RANK.fullmatch(path.name)
