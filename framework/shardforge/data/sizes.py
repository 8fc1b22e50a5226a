"""How many sequences each step reads: the full batch, or the ramp of a batch warm-up. Pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

from shardforge.core.errors import DataError, ForgeError
from shardforge.recipe.schema import TrainConfig


@dataclass(frozen=True)
class BatchSizes:
    """Level j = 0, 1, ... of the ramp holds start + j * increment sequences; `levels` of them share `steps` evenly."""

    full: int
    start: int
    increment: int
    steps: int

    @classmethod
    def of(cls, train: TrainConfig) -> BatchSizes:
        ramp = train.batch_warmup
        return cls(train.sequences, ramp.start, ramp.increment, ramp.steps) if ramp else cls(train.sequences, 0, 0, 0)

    @property
    def levels(self) -> int:
        return -(-(self.full - self.start) // self.increment) if self.steps else 0

    def problems(self, ranks: int) -> list[ForgeError]:
        """Why these sizes cannot be divided between data ranks."""
        named = {"train.sequences": self.full}
        if self.steps:
            named |= {"train.batch_warmup.start": self.start, "train.batch_warmup.increment": self.increment}
        out: list[ForgeError] = [
            DataError(
                f"{size} sequences for {ranks} data ranks do not divide", name, f"use {-(-size // ranks) * ranks}"
            )
            for name, size in named.items()
            if size % ranks
        ]
        if self.start > self.full:
            what = f"the warm-up starts at {self.start} sequences, the full batch has {self.full}"
            out.append(DataError(what, "train.batch_warmup.start", f"at most {self.full}"))
        return out

    def at(self, step: int) -> int:
        """Sequences of one step."""
        return self.full if step >= self.steps else self.start + self.increment * (step * self.levels // self.steps)

    def before(self, step: int) -> int:
        """Sequences of all earlier steps together, in O(log steps)."""
        ramp = min(step, self.steps)
        climbed = floor_sum(ramp, self.levels, self.steps) if ramp else 0
        return self.start * ramp + self.increment * climbed + self.full * (step - ramp)


def floor_sum(count: int, slope: int, divisor: int) -> int:
    """Sum of floor(i * slope / divisor) for i = 0 .. count - 1, exact.

    It counts lattice points under a line; what remains below slope 1 is counted along the other axis, and the two
    numbers shrink as in Euclid's algorithm.
    """
    total = offset = 0
    while True:
        total += (slope // divisor) * (count * (count - 1) // 2) + (offset // divisor) * count
        slope, offset = slope % divisor, offset % divisor
        top = slope * count + offset
        if top < divisor:
            return total
        count, offset = divmod(top, divisor)
        slope, divisor = divisor, slope
