"""Weights that somebody trained, as one thing to read from, whoever wrote them and in whatever files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shardforge.checkpoint.tensorheader import leads_out


@dataclass(frozen=True)
class Info:
    """A weight before it is read: its whole shape, and its type as stored, like "bfloat16"."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Extract:
    """A file that lies inside of another: name and content, as a `Path` has them."""

    name: str
    make: Callable[[], bytes]

    def read_bytes(self) -> bytes:
        return self.make()


@dataclass(frozen=True)
class Beside:
    """What lies beside the weights, as far as it is known."""

    step: int | None = None  # optimizer steps that made them
    recipe: Mapping[str, Any] | None = None  # a whole recipe as plain data, of which `Source.model` is the model
    extra: Mapping[str, Any] | None = None  # as of `step`: what a ShardForge checkpoint keeps of data, schedule, random
    length: int | None = None  # tokens of the longest sequence that they are made for
    tokens: Mapping[str, Any] = field(default_factory=dict)  # "bos_token_id": 1 and the like, as config.json has them
    tokenizer: tuple[Path | Extract, ...] = ()  # files that belong to a tokenizer, generation_config.json among them
    architecture: str | None = None  # that a config.json named, of several that may say the same model
    unread: tuple[str, ...] = ()  # what is there and cannot be taken along, a line each


BARE = Beside()
KEPT = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "generation_config.json",
)


CODE = ".py"


def belonging(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that go along with the weights wherever these go. Links out of it are none of it, and code
    is never taken along."""
    return tuple(file for file in _named(folder) if leads_out(file, folder) is None)


def astray(folder: Path) -> tuple[Path, ...]:
    """Files of a folder that would belong, were they not links out of it."""
    return tuple(file for file in _named(folder) if leads_out(file, folder) is not None)


def linked_away(folder: Path) -> tuple[str, ...]:
    """A line each on those."""
    return tuple(f"{file.name}: it is a link out of its folder, put the file itself there" for file in astray(folder))


def _named(folder: Path) -> list[Path]:
    found = {file for each in KEPT for file in folder.glob(each)}
    return sorted(file for file in found if file.is_file() and file.suffix != CODE)


class Source(Protocol):
    """Weights under ShardForge's names. Nothing is read before it is asked for, and nothing is ever written.

    Reading holds one weight in memory, and of weights that lie fused in a file all that are fused with it.
    """

    @property
    def path(self) -> Path: ...

    @property
    def model(self) -> dict[str, Any]:
        """The `model` section of a recipe, every field of it, as plain data."""
        ...

    @property
    def names(self) -> Mapping[str, Info]:
        """The weights, "blocks.3.ffn.gate.weight", in the order of the model."""
        ...

    @property
    def moments(self) -> tuple[str, ...]:
        """The optimizer's tensors that every weight has, ("exp_avg", "exp_avg_sq"); () for none."""
        ...

    @property
    def counts(self) -> tuple[str, ...]:
        """Single numbers that the optimizer keeps for every weight, ("step",)."""
        ...

    @property
    def beside(self) -> Beside: ...

    def read(self, name: str) -> Tensor:
        """The whole weight on the CPU, in the type of `names`. CheckpointError when the file cannot give it."""
        ...

    def read_moment(self, kind: str, name: str) -> Tensor:
        """What the optimizer keeps for a weight: of the weight's shape for a kind of `moments`, of shape [] for one of
        `counts`."""
        ...
