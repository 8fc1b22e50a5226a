"""A number that changes during a run: constant in pieces, by the share of the steps that are done."""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class Phase:
    at: float = option(REQUIRED, "share of the run's steps from which on the value holds", above=0, at_most=1)
    value: float = option(REQUIRED, "the value")


@dataclass(frozen=True, kw_only=True)
class Phases:
    """`weight: {start: 0.3, then: [{at: 0.676, value: 0.1}]}`: 0.3, and 0.1 once 67.6 % of the steps are done."""

    start: float = option(REQUIRED, "the value from the first step on")
    then: tuple[Phase, ...] = option((), "later values, in order")

    def __post_init__(self) -> None:
        for before, after in zip(self.then, self.then[1:], strict=False):
            if before.at >= after.at:
                raise RecipeError(f"{after.at} comes after {before.at}", "then", "write the phases in order")


def value_at(number: float | Phases, progress: float) -> float:
    """What a number is once the share `progress` of the steps is done."""
    if not isinstance(number, Phases):
        return number
    return next((phase.value for phase in reversed(number.then) if progress >= phase.at), number.start)


def used(number: float | Phases) -> bool:
    """Whether it is ever anything but 0."""
    if not isinstance(number, Phases):
        return number != 0
    return number.start != 0 or any(phase.value != 0 for phase in number.then)
