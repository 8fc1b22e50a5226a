"""A torch_dist checkpoint of Megatron-Core, which loads at any layout.

Reference: megatron-core 0.16, dist_checkpointing. Layers of one kind are stacked; each layer, each expert and each half
of a gated unit is a piece of its own. What kinds of Megatron's layers and optimizers name differently is there under
every name, once on the disk: local and Transformer Engine layers load it, and the distributed optimizer (as
`fully_reshardable`), the one with weights in half precision, and the plain one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import Part
from shardforge.convert import megatron_common, tokenizer
from shardforge.convert.design import counted, items, kept, sharded, types, updated
from shardforge.convert.format import File, Item, Options
from shardforge.convert.torchdist import Index, fingerprint, saved, write_pieces
from shardforge.core.errors import CheckpointError
from shardforge.families.megatron import NOTE
from shardforge.families.megatron_args import arguments, untold
from shardforge.families.megatron_dist import COMMON, MASTERS, METADATA
from shardforge.families.megatron_files import LATEST
from shardforge.families.megatron_names import Spot, spellings, spot, table
from shardforge.families.source import Source
from shardforge.families.statemap import StateMap

NAME = "megatron"
HELP = "torch_dist of Megatron-Core; loads at any layout, --layout fills the arguments beside it"
ADAM = {"exp_avg", "exp_avg_sq"}
STATE = "optimizer.state."
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
RELEASE = "release"
"""What Megatron calls weights of no step."""
MODULES: tuple[str, ...] = (
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "input_layernorm",
    "pre_mlp_layernorm",
)
MODULES += ("self_attention.linear_qkv", "self_attention.q_layernorm", "self_attention.k_layernorm")
MODULES += ("self_attention.linear_q_proj", "self_attention.linear_q_down_proj", "self_attention.linear_q_up_proj")
MODULES += ("self_attention.linear_kv_down_proj", "self_attention.linear_kv_up_proj", "self_attention.kv_layernorm")
MODULES += ("mlp.linear_fc1", "mlp.linear_fc2", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
EXPERTS = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")
FURTHER = ("enorm", "hnorm", "eh_proj", "final_layernorm")


@dataclass(frozen=True)
class TorchDist:
    """See `convert.format.Writer`."""

    files: tuple[File, ...]
    left: tuple[str, ...]
    folder: str  # of the iteration
    layers: int
    further: int  # modules of multi-token prediction
    experts: int
    stacked: bool  # layers lie in one tensor
    masters: bool  # the optimizer's weights are the model's, under other names too
    common: dict[str, Any]
    note: dict[str, Any]
    beside: tokenizer.Files

    def write(self, path: Path, parts: Sequence[Part]) -> dict[str, Any]:
        boxes = [self._spot(part.key)[1].box(part.shape)[1] for part in parts]
        return write_pieces(path, parts, boxes)

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        place, index = self.opened(folder), Index()
        for file in self.files:
            name = Path(file.name).name
            for item, (start, length) in zip(file.items, records[file.name]["pieces"], strict=True):
                prefix, spot = self._spot(item.key)
                for key in self._keys(prefix, spot.key):
                    index.add(key, item.dtype, spot.box(item.shape), (name, start, length))
        nothing = saved([None])
        extra = f"__{len(self.files)}_0.distcp"
        tensorfile.write_whole(place / extra, nothing)
        for key in self._extra():
            index.add_object(key, (extra, 0, len(nothing)))
        save = fingerprint(records)
        index.write(place / METADATA, save)
        tensorfile.write_whole(place / COMMON, saved(self.common))
        tensorfile.write_whole(place / "metadata.json", json.dumps(BACKEND).encode())
        tensorfile.write_whole(place / NOTE, (json.dumps({"save": save, **self.note}, indent=2) + "\n").encode())
        tokenizer.copy(self.beside, folder)
        told = self.folder.removeprefix("iter_").lstrip("0") or "0"
        tensorfile.write_whole(folder / LATEST, told.encode())

    def opened(self, folder: Path) -> Path:
        return folder / self.folder

    def _spot(self, key: str) -> tuple[str, Spot]:
        """The prefix of what an optimizer keeps, and where a tensor lies behind it."""
        kind, name = "", key
        if key.startswith(STATE):
            kind, name = key.removeprefix(STATE).split(".", 1)
            kind = f"{STATE}{kind}."
        return kind, spot(name, self.layers if self.stacked else None, self.experts)

    def _keys(self, prefix: str, key: str) -> Iterator[str]:
        """All names of a tensor in the file."""
        prefixes = [prefix]
        if prefix == f"{STATE}{MASTERS[0]}." or (not prefix and self.masters):
            prefixes = [*([""] if not prefix else []), *(f"{STATE}{kind}." for kind in MASTERS)]
        for each in prefixes:
            yield from (f"{each}{name}" for name in spellings(key))

    def _extra(self) -> Iterator[str]:
        """What modules keep beside their weights, which is nothing, under the names that they look for."""
        yield "decoder.final_layernorm._extra_state/shard_0_1"
        for layer in range(self.layers):
            place = "decoder.layers" if self.stacked else f"decoder.layers.{layer}"
            yield from self._of_layer(place, (layer, self.layers) if self.stacked else None)
        for depth in range(self.further):
            yield from (f"mtp.layers.{depth}.{name}._extra_state/shard_0_1" for name in FURTHER)
            yield from self._of_layer(f"mtp.layers.{depth}.transformer_layer", None)

    def _of_layer(self, place: str, at: tuple[int, int] | None) -> Iterator[str]:
        here, of = at or (0, 1)
        yield from (f"{place}.{name}._extra_state/shard_{here}_{of}" for name in MODULES)
        for name, expert in product(EXPERTS, range(self.experts)):
            number = f"{here}.{expert}_{of}.{self.experts}" if at else f"{expert}_{self.experts}"
            yield f"{place}.{name}._extra_state/shard_{number}"


def design(source: Source, options: Options) -> TorchDist:
    """See `convert.format.Format`."""
    sizes, vocab = megatron_common.sizes(options), int(source.model["vocab"])
    split = sizes["tensor_model_parallel_size"]
    padded = -(-vocab // split) * split
    args = arguments(source.model, padded, source.beside.length)
    state = StateMap(table(source.model, padded), {name: info.shape for name, info in source.names.items()})
    if state.unnamed:
        raise CheckpointError(f"Megatron has no name for {', '.join(state.unnamed[:6])}", source.path)
    kinds, left = _carried(source, options)
    dtypes, whole = types(source, options), {name: info.dtype for name, info in source.names.items()}
    step = source.beside.step
    folder = RELEASE if step is None else f"iter_{step:07d}"
    weights = set(updated(source))
    masters = bool(kinds) and all(dtypes[name] == whole[name] for name in weights)
    planned = sharded(_items(source, state, dtypes, whole, kinds, masters), options.shard_bytes)
    args |= sizes | megatron_common.training(source, _main(dtypes, weights), step or 0, bool(kinds))
    stacked = args.get("moe_layer_freq", 1) == 1
    count = counted(source, sorted(weights), "Megatron") if kinds else None
    return TorchDist(
        files=tuple(File(f"{folder}/__{at}_0.distcp", tuple(batch)) for at, batch in enumerate(planned)),
        left=(*left, *_left(source, bool(kinds))),
        folder=folder,
        layers=args["num_layers"],
        further=args.get("mtp_num_layers", 0),
        experts=args.get("num_experts", 0),
        stacked=stacked,
        masters=masters,
        common=megatron_common.common(source, args, step or 0, count, stacked),
        note=_note(source),
        beside=tokenizer.chosen(source, options),
    )


def _items(
    source: Source,
    state: StateMap,
    dtypes: Mapping[str, str],
    whole: Mapping[str, str],
    kinds: Mapping[str, str],
    masters: bool,
) -> Iterator[Item]:
    """Weight by weight: the model's, the optimizer's where it has another type, and the moments."""
    weights = set(updated(source))
    for group in state.groups:
        yield from items(group, dtypes, source)
        if not kinds or not weights.issuperset(group.ours):
            continue
        if not masters:
            yield from items(group, whole, source, prefix=f"{STATE}{MASTERS[0]}.")
        for kind, dtype in kinds.items():
            yield from items(group, dict.fromkeys(group.ours, dtype), source, kind, f"{STATE}{kind}.")


def _carried(source: Source, options: Options) -> tuple[dict[str, str], list[str]]:
    """Moments that go along with their types, and what stays behind."""
    found = {kind: dtype for kind, dtype in kept(source, options).items() if kind not in source.counts}
    if found.keys() == ADAM:
        return found, []
    if not source.moments:
        return {}, []
    why = "--moments drop" if options.moments == "drop" else "Megatron keeps those of Adam alone"
    return {}, [f"what the optimizer kept ({', '.join((*source.moments, *source.counts))}): {why}"]


def _left(source: Source, moments: bool) -> Iterator[str]:
    yield from dict.fromkeys(f"for Megatron, {line}" for line in untold(source.model))
    yield from megatron_common.unsaid(source, moments)


def _main(dtypes: Mapping[str, str], weights: set[str]) -> str:
    """The type of most weights."""
    found = [dtypes[name] for name in weights]
    return max(set(found), key=found.count)


def _note(source: Source) -> dict[str, Any]:
    """What the way back needs, as plain data."""
    beside = source.beside
    told = {
        "step": beside.step,
        "recipe": beside.recipe,
        "extra": beside.extra,
        "length": beside.length,
        "tokens": dict(beside.tokens),
        "architecture": beside.architecture,
    }
    return json.loads(json.dumps(told))
