"""Any course in pieces: constant, along a line or along half a cosine, each up to a share of the steps.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 4.2 (constant, cosine, two more
    constants); steps down by a factor are DeepSeek-AI 2024, "DeepSeek LLM", arXiv:2401.02954, section 2.3.
Changes: after a linear warm-up the rate is that of the piece in which the step lies: `lr` throughout in a constant one,
    and from the rate of the piece before to `lr` at the piece's end along the others.
Cost: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import schedules
from shardforge.optim.shape import progress, warmed


@dataclass(frozen=True, kw_only=True)
class Piece:
    until: float = option(
        REQUIRED, "share of the run's steps at which the piece ends; 1 in the last", above=0, at_most=1
    )
    lr: float = option(REQUIRED, "learning rate at the end of the piece", at_least=0)
    curve: Literal["constant", "linear", "cosine"] = option(
        "constant", "constant: lr from the beginning on; linear, cosine: from the rate before to lr"
    )


@schedules.register("phases")
@dataclass(frozen=True, kw_only=True)
class PhasesConfig:
    pieces: tuple[Piece, ...] = option(REQUIRED, "the pieces in order; the first is constant, the last ends at 1")
    warmup: int = option(0, "steps of linear warm-up", unit="steps", at_least=0)

    def __post_init__(self) -> None:
        if not self.pieces:
            raise RecipeError("there is no piece", "pieces", "write [{until: 1.0, lr: 3.0e-4}]")
        if self.pieces[0].curve != "constant":
            what = f"the first piece is {self.pieces[0].curve}, and there is no rate before it to begin with"
            raise RecipeError(what, "pieces", "put a constant piece before it")
        ends = [0.0, *(piece.until for piece in self.pieces)]
        for before, after in pairwise(ends):
            if before >= after:
                raise RecipeError(
                    f"a piece until {after} comes after one until {before}", "pieces", "write them in order"
                )
        if ends[-1] != 1:
            raise RecipeError(f"the pieces end at {ends[-1]} of the steps", "pieces", "write until: 1.0 in the last")

    def at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (0-based) of a run of `steps`."""
        begin, rate = 0, self.pieces[0].lr
        for piece in self.pieces:
            end = round(piece.until * steps)
            if step < end or piece is self.pieces[-1]:
                rate = _along(piece, rate, progress(step, begin, end))
                break
            begin, rate = end, piece.lr
        return rate * warmed(step, self.warmup)


def _along(piece: Piece, before: float, done: float) -> float:
    """The rate in a piece of which the share `done` is over."""
    left = {"constant": 0.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[piece.curve]
    return piece.lr + (before - piece.lr) * left
