"""Kinds for recipe tests, without torch, and a whole recipe made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest

from shardforge.core import slots
from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import Mask, Norm, Position, Slot


def kind(name: str) -> Any:
    """Give a config the name that Slot.register would give it."""

    def keep(config: type) -> type:
        config.kind = name  # type: ignore[attr-defined]
        return config

    return keep


@kind("rmsnorm")
@dataclass(frozen=True, kw_only=True)
class Rms:
    eps: float = option(1e-6, "added to the mean square", above=0)


@kind("rope")
@dataclass(frozen=True, kw_only=True)
class Rope:
    base: float = option(1e4, "slowest turn", above=1)
    parts: tuple[int, int] | None = option(None, "how the channels are divided")


@kind("nope")
@dataclass(frozen=True, kw_only=True)
class Nope:
    """No position at all."""

    supports: ClassVar[frozenset[str]] = frozenset()


@kind("causal")
@dataclass(frozen=True, kw_only=True)
class Causal:
    pass


@kind("gqa")
@dataclass(frozen=True, kw_only=True)
class Gqa:
    heads: int = option(REQUIRED, "query heads", at_least=1)
    position: Position = option("rope", "how order enters")
    mask: Mask = option(Causal(), "what is seen")
    qk_norm: Norm | None = option(None, "norm on queries and keys")
    norms: tuple[Norm, ...] = option(("rmsnorm",), "more norms")
    gain: float | Literal["auto"] = option("auto", "factor")

    def __post_init__(self) -> None:
        if self.heads == 13:
            raise RecipeError("13 heads bring bad luck", "heads", "write 12")
        if self.heads == 17:
            raise ValueError("17 heads are too many")


@kind("glu")
@dataclass(frozen=True, kw_only=True)
class Glu:
    inner: int = option(REQUIRED, "width", at_least=1)


@kind("mlp")
@dataclass(frozen=True, kw_only=True)
class Mlp:
    inner: int = option(REQUIRED, "width", at_least=1)
    bias: bool = option(False, "biases")


@kind("pre")
@dataclass(frozen=True, kw_only=True)
class Pre:
    norm: Norm = option("rmsnorm", "the norm")


@kind("constant")
@dataclass(frozen=True, kw_only=True)
class Constant:
    lr: float = option(REQUIRED, "learning rate", above=0)
    warmup: int = option(0, "warm-up", unit="steps", at_least=0)


@kind("adamw")
@dataclass(frozen=True, kw_only=True)
class Adamw:
    betas: tuple[float, float] = option((0.9, 0.95), "decays", at_least=0, at_most=1)
    groups: tuple[str, ...] = option(("matrix",), "decayed groups")


@kind("board")
@dataclass(frozen=True, kw_only=True)
class Board:
    note: str = option("", "any text")


def empty(name: str) -> type:
    """A kind without fields."""
    return kind(name)(dataclasses.make_dataclass(name.title(), [], frozen=True, kw_only=True))


SHELVES: Mapping[Slot, Mapping[str, type]] = {
    slots.embeddings: {"token": empty("token")},
    slots.mixers: {"gqa": Gqa},
    slots.positions: {"rope": Rope, "nope": Nope},
    slots.masks: {"causal": Causal},
    slots.cores: {"auto": empty("auto"), "eager": empty("eager")},
    slots.ffns: {"glu": Glu, "mlp": Mlp},
    slots.norms: {"rmsnorm": Rms, "none": empty("none")},
    slots.residuals: {"pre": Pre},
    slots.heads: {"linear": empty("linear")},
    slots.objectives: {"next_token": empty("next_token")},
    slots.optimizers: {"adamw": Adamw},
    slots.schedules: {"constant": Constant},
    slots.engines: {"native": empty("native")},
    slots.observers: {"board": Board},
}


@contextmanager
def stocked() -> Iterator[None]:
    """The slots of a recipe hold the kinds of this file, and nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        for slot, kinds in SHELVES.items():
            patch.setattr(slot, "_kinds", dict(kinds))
            patch.setattr(slot, "_listed", True)
        yield


TEXT = """\
model:
  vocab: 64
  hidden: 16
  blocks:
    dense: {mixer: {kind: gqa, heads: 4}, ffn: {kind: glu, inner: 32}}
  stack: [dense x 2]
data:
  sources: [{path: corpus}]
schedule: {kind: constant, lr: 1.0e-3}
train: {steps: 10, sequences: 8, seq_len: 32}
"""
"""The smallest whole recipe."""
