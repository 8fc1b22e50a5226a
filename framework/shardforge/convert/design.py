"""What formats ask of a source before they plan: which weights there are, which types, what goes into which file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import nn

from shardforge.checkpoint.tensorfile import TYPES, type_name
from shardforge.convert.format import Item, Options
from shardforge.core.errors import CheckpointError
from shardforge.families.section import config
from shardforge.families.source import Source
from shardforge.families.statemap import Group
from shardforge.model.build import build

SHARD_BYTES = (256 << 20, 4 << 30)
"""The least and the most of a file whose size nobody chose."""
SHARDS = 16
"""Files in between: each is one process's work from beginning to end, and so many processes can share it."""
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def updated(source: Source) -> tuple[str, ...]:
    """The weights that an optimizer updates, in the order of the model: all but what modules remember beside them."""
    model = build(config(source.model, source.path), nn.Identity())
    return tuple(name for name, _ in model.named_parameters() if name in source.names)


def types(source: Source, options: Options) -> dict[str, str]:
    """The type of every weight in the result. What a module remembers beside its weights keeps its own."""
    asked = NAMES.get(options.dtype)
    weights = set(updated(source)) if asked else ()
    return {name: asked if asked and name in weights else info.dtype for name, info in source.names.items()}


def kept(source: Source, options: Options) -> dict[str, str]:
    """Kind of what the optimizer kept -> its type, of all that is carried; {} for nothing."""
    kinds = (*source.moments, *source.counts) if options.moments == "carry" else ()
    weights = updated(source) if kinds else ()
    smallest = min(weights, key=lambda name: prod(source.names[name].shape), default="")
    return {kind: type_name(source.read_moment(kind, smallest).dtype) for kind in kinds}


def items(group: Group, names: Mapping[str, str], source: Source, kind: str = "", prefix: str = "") -> Iterator[Item]:
    """The tensors that a group of weights becomes; `names` has the type of each weight of ours."""
    dtype = names[group.ours[0]]
    for name in group.ours:
        dtype = type_name(torch.promote_types(TYPES[dtype][0], TYPES[names[name]][0]))
    ours = [torch.empty(source.names[name].shape, dtype=TYPES[dtype][0], device="meta") for name in group.ours]
    made = group.form.theirs(ours)
    assert len(made) == len(group.theirs), f"{len(made)} tensors for {group.theirs}"
    for part, (name, tensor) in enumerate(zip(group.theirs, made, strict=True)):
        yield Item(f"{prefix}{name}", dtype, tuple(tensor.shape), group.ours, part, group.form, kind)


def shard_bytes(total: int) -> int:
    """Bytes of a file, in whole MiB, of a result of `total` bytes; whoever makes it, with however many processes."""
    least, most = SHARD_BYTES
    return min(most, max(least, -(-total // (SHARDS << 20)) << 20))


def sharded(items: Iterable[Item], limit: int | None) -> list[list[Item]]:
    """Items in files, of which each is closed when it has reached `limit` bytes, or those of `shard_bytes`."""
    items, found = list(items), list[list[Item]]()
    if limit is None:
        limit = shard_bytes(sum(item.bytes for item in items))
    size = limit
    for item in items:
        if size >= limit:
            found.append([])
            size = 0
        found[-1].append(item)
        size += item.bytes
    return found


def dropped(source: Source, options: Options, place: str) -> list[str]:
    """What a format without a place for anything but weights leaves behind, a line each."""
    beside, lines = source.beside, []
    if source.moments or source.counts:
        kinds = ", ".join((*source.moments, *source.counts))
        why = "--moments drop" if options.moments == "drop" else f"{place} has no place for it"
        lines.append(f"what the optimizer kept for each weight ({kinds}): {why}")
    if beside.step is not None:
        lines.append(f"the step, {beside.step}: {place} has no place for it")
    if beside.recipe is not None:
        lines.append(f"the recipe beyond the model (optimizer, schedule, data): {place} has no place for it")
    if beside.extra:
        lines.append(f"the position in the data and the state of chance: {place} has no place for them")
    return lines


def no_layout(options: Options, place: str) -> None:
    """CheckpointError for a layout that is asked of files that have none."""
    if options.layout:
        raise CheckpointError(f"{place} has no layout: any number of ranks reads it", "--layout", "leave it out")


def counted(source: Source, weights: Sequence[str], format: str) -> float:
    """The updates that the optimizer counted, for a format that keeps one number for all weights; CheckpointError when
    they differ in it."""
    if "step" not in source.counts:
        return float(source.beside.step or 0)
    found: dict[float, str] = {}
    for name in weights:
        found.setdefault(float(source.read_moment("step", name)), name)
    if len(found) > 1:
        told = ", ".join(f"{count:.0f} for {name}" for count, name in sorted(found.items())[:4])
        what = f"the optimizer counted other steps for other weights ({told}), {format} keeps one number for all"
        raise CheckpointError(what, source.path, "--moments drop")
    return next(iter(found), 0.0)
