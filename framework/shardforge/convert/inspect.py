"""What a checkpoint is: whose, of which model, in which layout, how large. Headers only; no number is read.

A checkpoint that cannot be opened as a model, because it is damaged or its model is not known, is told as far as it is
there: its files, the tensors in them under their own names, and what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from shardforge.checkpoint import folders
from shardforge.checkpoint.tensorfile import TYPES
from shardforge.convert.design import updated
from shardforge.convert.inspect_files import Laid, laid, stored
from shardforge.core.errors import CheckpointError, ForgeError, Problems
from shardforge.core.layout import Layout
from shardforge.families.linked import Tensors
from shardforge.families.open import open_source, recognised
from shardforge.families.source import BARE, Beside, Info, Source
from shardforge.plan.params import Params, params
from shardforge.recipe.load import STAND_INS, from_mapping

SAFETENSORS = "safetensors"


@dataclass(frozen=True)
class Opened:
    """A checkpoint as a model's weights under our names (`source`), or as tensors under those of its files."""

    kind: str  # as in `families.open.KINDS`, or "safetensors" for files that nothing says more about
    title: str
    path: Path  # of the step, or the file, that is meant
    tensors: Source | Tensors | None
    source: Source | None
    problems: tuple[str, ...] = ()

    @property
    def names(self) -> Mapping[str, Info]:
        return self.tensors.names if self.tensors is not None else {}

    def entries(self, moments: bool) -> Iterator[tuple[str, Info, Callable[[], Tensor]]]:
        """Name, shape, and what reads it, of each tensor; with `moments` of what the optimizer keeps for it too."""
        if self.tensors is None:
            return
        source = self.source if moments and self.source and self.source.moments else None
        weights = set(updated(source)) if source else ()
        for name, info in self.names.items():
            yield name, info, partial(self.tensors.read, name)
            if source and name in weights:
                for kind in source.moments:
                    yield f"{name} {kind}", info, partial(source.read_moment, kind, name)


@dataclass(frozen=True)
class Inspection:
    """What the headers of a checkpoint say."""

    opened: Opened
    laid: Laid
    layout: str  # "tp2-pp4"; "" when nothing says it
    beside: Beside = BARE
    model: Mapping[str, Any] | None = None  # the model section of a recipe, whole
    counts: Params | None = None  # of its weights, by role
    types: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # type -> tensors, numbers, bytes

    @property
    def problems(self) -> tuple[str, ...]:
        return self.opened.problems


def opened(path: Path, config: Path | None = None) -> Opened:
    """`config` as for `families.open.open_source`. CheckpointError for a path where nothing of a checkpoint is."""
    kind, title, found, problems = _recognised(path)
    source: Source | None = None
    if kind != SAFETENSORS and not problems:
        try:
            source = open_source(path, config)
        except ForgeError as error:
            if error.where.startswith("--config"):
                raise  # a mistake in the command, not in the checkpoint
            problems = tuple(lines(error))
    if source is not None:
        return Opened(kind, title, found, source, source)
    try:
        raw = stored(kind, found)
    except ForgeError as error:
        return Opened(kind, title, found, None, None, tuple(dict.fromkeys((*problems, *lines(error)))))
    told = [*problems, *(each for each in getattr(raw, "problems", ()) if not any(each in line for line in problems))]
    return Opened(kind, title, found, raw, None, tuple(told))


def inspect(path: Path, config: Path | None = None) -> Inspection:
    """What the headers say. CheckpointError for a path where nothing of a checkpoint is."""
    found = opened(path, config)
    files = laid(found.kind, found.path)
    beside = found.source.beside if found.source else BARE
    model = found.source.model if found.source else None
    return Inspection(
        opened=found,
        laid=files,
        layout=_layout(files, beside),
        beside=beside,
        model=model,
        counts=_counts(found.path.name, model) if model else None,
        types=types(found.names),
    )


def types(names: Mapping[str, Info]) -> dict[str, tuple[int, int, int]]:
    """Number type -> tensors, numbers, bytes; the largest first."""
    found: dict[str, tuple[int, int, int]] = {}
    for info in names.values():
        tensors, numbers, size = found.get(info.dtype, (0, 0, 0))
        found[info.dtype] = tensors + 1, numbers + prod(info.shape), size + bytes_of(info)
    return dict(sorted(found.items(), key=lambda each: -each[1][2]))


def bytes_of(info: Info) -> int:
    return prod(info.shape) * TYPES[info.dtype][0].itemsize


def lines(error: ForgeError) -> Iterator[str]:
    """The problems of an error, one a line, with what to do about it."""
    for each in error.problems if isinstance(error, Problems) else (error,):
        where = f"{Path(each.where).name}: " if each.where else ""
        yield f"{where}{each.what}" + (f" ({each.fix})" if each.fix else "")


def _recognised(path: Path) -> tuple[str, str, Path, tuple[str, ...]]:
    """Kind, title, what to open, and why it is not opened as a model."""
    if path.is_dir() and folders.TORN.fullmatch(path.resolve().name) and not (path / folders.MARKER).is_file():
        why = "this save was never committed: it is being written, or torn; `shardforge checkpoint list` names others"
        return "shardforge", "ShardForge", path, (why,)
    try:
        kind, found = recognised(path)
    except CheckpointError as error:
        loose = path.suffix == ".safetensors" if path.is_file() else any(path.glob("*.safetensors"))
        if not loose:
            raise
        return SAFETENSORS, "safetensors", path, tuple(lines(error)) if path.is_dir() else ()
    return kind.name, kind.title, found, ()


def _layout(files: Laid, beside: Beside) -> str:
    """What the files say of degrees of parallelism, or the recipe of the run."""
    degrees = {axis: degree for axis, degree in files.layout.items() if degree > 1}
    if files.layout:
        return "-".join(f"{axis}{degree}" for axis, degree in degrees.items()) or "one"
    parallel = (beside.recipe or {}).get("parallel")
    return str(Layout(**parallel)) if parallel else ""


def _counts(name: str, model: Mapping[str, Any]) -> Params:
    return params(from_mapping({**STAND_INS, "name": name, "model": model}).recipe)
