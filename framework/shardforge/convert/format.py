"""What a format of checkpoints decides about a conversion before a number is read: files, tensors, their forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.families.forms import Form
from shardforge.families.source import Source

DTypes = Literal["source", "fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Options:
    """What a user asks of a conversion, beside source and destination."""

    to: str  # name of a format
    layout: Mapping[str, int] | None = None  # like {"tp": 2, "pp": 4}: for formats that have a place for it
    dtype: DTypes = "source"  # of the weights; moments keep theirs
    moments: Literal["carry", "drop"] = "carry"  # carry: what the optimizer kept, where both sides have a place for it
    shard_bytes: int | None = None  # a file of several tensors is closed when it has reached this many
    tokenizer: Path | None = None  # folder whose tokenizer files go along; the source's own unless given
    config: Path | None = None  # as for `families.open.open_source`: what says which model the source is
    target: Path = Path()  # where the result will lie, for files that name it


@dataclass(frozen=True)
class Item:
    """One tensor of the result: number `part` of what `form.theirs` makes of the weights `ours`."""

    key: str  # its name in its file
    dtype: str  # of TYPES
    shape: tuple[int, ...]
    ours: tuple[str, ...]
    part: int
    form: Form
    kind: str = ""  # what the optimizer keeps for the weights, like "exp_avg"; "" for the weights themselves

    @property
    def bytes(self) -> int:
        size = TYPES[self.dtype][0].itemsize
        for each in self.shape:
            size *= each
        return size


@dataclass(frozen=True)
class File:
    """One file of the result, which one job writes from beginning to end; `name` may have folders: "zero/x/fp32.pt"."""

    name: str
    items: tuple[Item, ...]

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


class Writer(Protocol):
    """A conversion into one format. Plain data: processes that write get a copy.

    Files lie in a folder that nobody takes for a checkpoint until it is renamed into its place, all of it at once.
    """

    files: Sequence[File]
    left: Sequence[str]  # what of the source has no place here, a line each

    def write(self, path: Path, parts: Sequence[Part]) -> dict[str, Any]:
        """Write one file whose items are `parts`, in their order, one at a time; what `finish` needs of it comes back
        as JSON. "bytes" and "sha256" of the file, where they are known already, spare reading it again."""
        ...

    def finish(self, folder: Path, records: Mapping[str, dict[str, Any]]) -> None:
        """Write what goes beside the tensors, when all files are there; `records` are what `write` gave, by file."""
        ...

    def opened(self, folder: Path) -> Path:
        """What `families.open.open_source` opens of a finished folder."""
        ...


class Format(Protocol):
    """A module of `convert.formats`: NAME is what users write, HELP a line about it."""

    NAME: str
    HELP: str

    def design(self, source: Source, options: Options) -> Writer:
        """Problems or CheckpointError with all that the format cannot say of this model."""
        ...
