"""What an upcycling method answers: which neurons of the dense ffn an expert gets, and which numbers it changes.

All chance is a function of (seed, layer, expert, what is drawn): neither the order of the work, nor who does it, nor
the other experts have any part in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from shardforge.core.slots import Slot

methods = Slot("upcycling method", "shardforge.upcycle.methods")
Method = Annotated[Any, methods]

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """The chance of one expert of one layer; expert None is what belongs to the layer as a whole."""

    seed: int
    layer: int
    expert: int | None = None

    def generator(self, what: str) -> np.random.Generator:
        """A new stream of its own for each `what`, "noise/gate" for example."""
        words = f"upcycle/{self.seed}/{self.layer}/{self.expert}/{what}"
        return np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.sha256(words.encode()).digest(), "big")))

    def subset(self, what: str, size: int, count: int) -> Indices:
        """`count` of 0 ... size - 1, ascending."""
        return np.sort(self.generator(what).permutation(size)[:count])

    def order(self, what: str, size: int, count: int) -> Indices:
        """`count` of 0 ... size - 1, in the order in which they were drawn."""
        return self.generator(what).permutation(size)[:count]


@dataclass(frozen=True)
class Shape:
    """Sizes that a method may ask for, of one layer."""

    dense: int  # neurons of the dense ffn
    expert: int  # neurons of one expert
    experts: int
    std: Mapping[str, float]  # with which the model's own initialization draws each matrix


@dataclass(frozen=True)
class Moments:
    """Sums over each neuron's numbers in one matrix (float64), from which the statistics of any set follow."""

    count: int  # numbers that a neuron has
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    def of(self, neurons: Indices) -> tuple[float, float]:
        """Mean and unbiased standard deviation of the numbers of these neurons; 0 where one number has no spread."""
        numbers = self.count * len(neurons)
        if not numbers:
            return 0.0, 0.0
        mean = float(self.sums[neurons].sum()) / numbers
        spread = float(self.squares[neurons].sum()) - numbers * mean * mean
        return mean, (max(0.0, spread) / (numbers - 1)) ** 0.5 if numbers > 1 else 0.0


def nothing() -> Indices:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Edit:
    """What changes in one matrix of an expert: the numbers of the neurons at `places` become mean + std * noise, or
    gain that when `added`."""

    places: Indices = field(default_factory=nothing)  # among the expert's neurons, ascending
    mean: float = 0.0
    std: float = 0.0
    added: bool = False

    @property
    def redrawn(self) -> Indices:
        """Places of which nothing of the dense ffn is left."""
        return nothing() if self.added else self.places


class Plain:
    """A method that copies: what the others change stands in their own files."""

    keeps_output_bias = True  # the bias of down belongs to no neuron
    scaled = False  # whether `scale: auto` scales

    @property
    def unchanged(self) -> bool:
        """Whether every number of an expert is one of the dense ffn's."""
        return True

    def group(self, dense: int, expert: int) -> int:
        """Consecutive experts that one router row is repeated for, and that together are one dense ffn."""
        return 1

    def refused(self, dense: int, expert: int, experts: int, k: int) -> Iterator[tuple[str, str, str]]:
        """(field, what is wrong, fix) for sizes that the method cannot work with."""
        yield from ()

    def neurons(self, draw: Draw, shape: Shape) -> Indices | None:
        """Neurons of the dense ffn, in the order in which this expert has them; None for all, as they are."""
        if shape.expert == shape.dense:
            return None
        return draw.order("neurons", shape.dense, shape.expert)

    def edit(self, draw: Draw, shape: Shape, matrix: str, moments: Moments, neurons: Indices | None) -> Edit:
        """What to change in "gate", "up", "down", "gate_bias" or "up_bias" of an expert made of `neurons`; the moments
        are those of the dense matrix. A neuron's bias is one more number of the neuron."""
        return Edit()


def touched(draw: Draw, shape: Shape, matrix: str, ratio: float, share_indices: bool) -> Indices:
    """floor(ratio * neurons) places of an expert: the same for all of its matrices, or a set of their own."""
    what = "drop" if share_indices else f"drop/{matrix.removesuffix('_bias')}"
    return draw.subset(what, shape.expert, int(ratio * shape.expert))


def scattered(draw: Draw, shape: Shape, share_indices: bool) -> Indices | None:
    """Neurons as the released script of Drop-Upcycling takes them: in random order, unless indices are shared."""
    if shape.expert == shape.dense and share_indices:
        return None
    return draw.order("neurons", shape.dense, shape.expert)
