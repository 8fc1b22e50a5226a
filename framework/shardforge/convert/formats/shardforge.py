"""A run directory of ours: recipe.yaml and one committed checkpoint.

From a checkpoint that training left it is the same run again, which goes on where it stood; from published weights it
is a start for a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardforge.checkpoint import folders, index, state, tensorfile
from shardforge.checkpoint.index import Chunk, Entry
from shardforge.checkpoint.tensorfile import Part
from shardforge.convert import tokenizer
from shardforge.convert.design import items, kept, sharded, types, updated
from shardforge.convert.format import File, Item, Options
from shardforge.convert.tokenizer import Files
from shardforge.core.rundir import RunDir
from shardforge.families import ready
from shardforge.families.forms import SAME
from shardforge.families.section import config
from shardforge.families.shardforge import BESIDE, MODEL, OPTIM, TOKENIZER
from shardforge.families.source import Source
from shardforge.families.statemap import Group
from shardforge.model.build import build
from shardforge.plan.fake import give_storage
from shardforge.precision.types import DTYPES
from shardforge.recipe.load import from_mapping
from shardforge.recipe.provenance import dump, inline

NAME = "shardforge"
HELP = "a run directory: recipe.yaml and a checkpoint; `shardforge train` goes on with it or starts from it"
HEAD = """\
# A model that `shardforge convert` brought here; conversion.json says from where and proves it. Optimizer, schedule and
# sizes below are a plain start for training it further, published by nobody: make them yours.
"""
LENGTH = 4096


@dataclass(frozen=True)
class RunFolder:
    """See `convert.format.Writer`."""

    files: tuple[File, ...]
    left: tuple[str, ...]
    step: int
    recipe: str  # YAML
    described: dict[str, Any]  # as `state.table`
    extra: dict[str, Any]
    tokenizer: Files

    def write(self, path: Path, parts: Sequence[Part]) -> dict[str, Any]:
        return vars(tensorfile.write_tensors(path, parts))

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        place = self.opened(folder)
        table = place / index.NAME
        tensorfile.write_whole(table, index.to_json(_entries(self.files)))
        files = [records[file.name] for file in self.files]
        files.append({"file": table.name, "bytes": table.stat().st_size, "sha256": tensorfile.sha256(table)})
        if self.tokenizer:
            tokenizer.copy(self.tokenizer, folder / TOKENIZER)
        tensorfile.write_whole(RunDir(folder).recipe, self.recipe.encode())
        manifest = {"step": self.step, "describe": {"model": self.described}, "extra": self.extra, "files": files}
        folders.seal(place, self.step, manifest)

    def opened(self, folder: Path) -> Path:
        return RunDir(folder).checkpoints / folders.name(self.step)


def design(source: Source, options: Options) -> RunFolder:
    """See `convert.format.Format`."""
    beside, dtypes, kinds = source.beside, types(source, options), kept(source, options)
    step = beside.step or 0
    planned = sharded(_items(source, dtypes, kinds), options.shard_bytes)
    place = RunDir(Path()).checkpoints / folders.name(step)
    names = [(place / index.file_name(number, 0)).as_posix() for number in range(len(planned))]
    files = tuple(File(name, tuple(batch)) for name, batch in zip(names, planned, strict=True))
    left: list[str] = []
    if source.moments and not kinds:
        left.append(f"what the optimizer kept ({', '.join((*source.moments, *source.counts))}): --moments drop")
    changed = _changes(source, _entries(files))
    known = {"tokens": dict(beside.tokens), "length": beside.length, "architecture": beside.architecture}
    extra: dict[str, Any] = {BESIDE: known}
    if changed and (beside.recipe or beside.extra or source.moments):
        left.append(f"the run, which can be started from these weights but not gone on with: {changed[0]}")
    if not changed:
        extra = {**(beside.extra or {}), **extra}
    files_beside = tokenizer.chosen(source, options)
    text = _start(source, options, carried=bool(kinds)) if changed else _again(source, options)
    described = state.table(build(config(source.model, source.path), nn.Identity()))
    described = {name: {**row, "dtype": dtypes[name]} for name, row in described.items() if name in dtypes}
    return RunFolder(files, tuple(left), step, text, described, extra, files_beside)


def _items(source: Source, dtypes: Mapping[str, str], kinds: Mapping[str, str]) -> list[Item]:
    """All weights in the order of the model, then what the optimizer kept, kind by kind."""
    found: list[Item] = []
    for name in source.names:
        found += items(Group((name,), (name,), SAME), dtypes, source, prefix=MODEL)
    for kind, dtype in kinds.items():
        for name in updated(source):
            shape = () if kind in source.counts else source.names[name].shape
            found.append(Item(f"{OPTIM}{name}.{kind}", dtype, shape, (name,), 0, SAME, kind))
    return found


def _entries(files: Sequence[File]) -> dict[str, Entry]:
    """The index: every tensor is one chunk."""
    found: dict[str, Entry] = {}
    for file in files:
        for item in file.items:
            chunk = Chunk((0,) * len(item.shape), item.shape, Path(file.name).name, item.key)
            found[item.key] = Entry(item.dtype, item.shape, (chunk,))
    return found


def _changes(source: Source, entries: Mapping[str, Entry]) -> list[str]:
    """What keeps the run that left the source from going on with these tensors, a line each; [] for nothing."""
    beside = source.beside
    if beside.recipe is None:
        return ["there is no recipe of it"]
    if not beside.extra or "data" not in beside.extra:
        return ["nothing says where it stood in its data"]
    recipe = from_mapping(beside.recipe).recipe
    model = build(recipe.model, recipe.objective.build(), DTYPES[recipe.precision.master])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    give_storage(model, mode)
    with mode:  # an optimizer has to take a step before it tells what it keeps
        return index.differences(entries, state.collect(model, recipe.optim.build(model)))


def _again(source: Source, options: Options) -> str:
    """The recipe of the run, which lies in the target now."""
    assert source.beside.recipe is not None
    changes: dict[str, Any] = {"run_dir": str(options.target)}
    if options.layout:
        changes["parallel"] = {**source.beside.recipe["parallel"], **options.layout}
    return dump(from_mapping({**source.beside.recipe, **changes}).recipe)


def _start(source: Source, options: Options, *, carried: bool) -> str:
    """A recipe that starts from the weights: the one that they were trained with, or a plain one."""
    known = source.beside.recipe
    moments = {"start_moments": "carried"} if carried else {"start_moments": "dropped"}
    if known is not None:
        train = {**known["train"], "start": str(options.target), **moments}
        changes: dict[str, Any] = {"name": f"{known['name']}{ready.RUN}", "run_dir": None, "train": train}
        if options.layout:
            changes["parallel"] = {**known["parallel"], **options.layout}
        return dump(from_mapping({**known, **changes}).recipe)
    length = ready.length(source.model, min(LENGTH, source.beside.length or LENGTH))
    rest = [
        "optim: {kind: adamw, beta1: 0.9, beta2: 0.95, eps: 1.0e-08, weight_decay: 0.1, clip: 1.0}",
        "schedule: {kind: cosine, lr: 2.0e-05, warmup: 500, floor: 0.1}  # to 2e-6",
        "precision: {master: fp32, compute: bf16, reduce: fp32}",
        *([f"parallel: {inline(dict(options.layout))}"] if options.layout else []),
        "train:",
        f"  start: {inline(str(options.target))}",
        *(["  start_moments: carried"] if carried else []),
        "  steps: 10000",
        "  sequences: 256",
        f"  seq_len: {length}",
        "  micro_batch: 1",
    ]
    return ready.recipe(options.target, source.model, rest, head=HEAD)
