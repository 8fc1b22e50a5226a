"""What a layout found against what one process found: the worst error of each kind, and everything that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.verify.measure import Found, Key

RTOL = 1e-10
"""Of the norm of the expected tensor, in float64."""
FLOOR = 1e-5
"""Of the largest tensor of the same kind: what is smaller is compared with this, or its rounding would be an error."""
STILL = 1e-12
"""A gradient below this share of the largest is rounding alone, and so is what an optimizer makes of it."""

ROWS = (
    "loss",
    "term",
    "scored labels",
    "expert load",
    "gradient",
    "gradient norm",
    "weight",
    "remembered",
    "optimizer state",
    "copies",
)
"""What is compared, in the order in which one follows from the other."""


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what one process found; `got` is None where no rank has it, `want` where that has none.

    `ratio` is the best factor in got = ratio * want, `rest` what of got it leaves unexplained, relative.
    """

    key: Key
    error: float
    got: Tensor | None
    want: Tensor | None
    ratio: float = float("nan")
    rest: float = float("nan")

    @property
    def phase(self) -> str:
        return self.key[0]

    @property
    def what(self) -> str:
        return self.key[1]

    @property
    def name(self) -> str:
        return self.key[2]


@dataclass
class Evidence:
    """Everything that a cause may be read from, for one case."""

    layout: Layout
    got: Mapping[Key, Tensor]
    want: Mapping[Key, Tensor]
    differences: list[Difference]
    dims: Mapping[str, tuple[Dim, ...]]  # of every weight of the small model
    order: Sequence[str]  # names of the weights as the forward pass meets them
    guesses: dict[str, Mapping[Key, Tensor]] = field(default_factory=dict)
    """What a mistake is -> step 1 as it would be with it."""

    def wrong(self, *whats: str) -> list[Difference]:
        """Of the earliest phase in which one of `whats` differs; all that comes later may follow from it."""
        found = [each for each in self.differences if each.what in whats]
        return [each for each in found if each.phase == found[0].phase]

    def gradients(self, phase: str) -> dict[str, Tensor]:
        return {name: value for (at, what, name), value in self.want.items() if (at, what) == (phase, "gradient")}

    def split(self, name: str) -> bool:
        """Whether tp, ep or etp splits this weight."""
        return bool(self.layout.split(self.dims.get(name, ())))

    def expert(self, name: str) -> bool:
        return any(dim.name.startswith("expert") for dim in self.dims.get(name, ())[:1])


def compare(
    found: Sequence[Found], want: Mapping[Key, Tensor]
) -> tuple[dict[Key, Tensor], dict[str, float], list[Difference]]:
    """(all tensors, worst error of each row, differences in the order of phases) of what the ranks of a case found."""
    got = {key: value for each in found for key, value in each.values.items()}
    floors, still = _floors(want), _still(want)
    worst: dict[str, float] = {}
    differences = []
    for key in sorted(got.keys() | want.keys(), key=_place):
        one = _difference(key, got.get(key), want.get(key), floors)
        phase, what, name = key
        if what in ("weight", "optimizer state") and phase != "start" and _owner(key) in still:
            continue
        worst[what] = max(worst.get(what, 0.0), one.error)
        if not one.error <= RTOL:
            differences.append(one)
    for key, rank, error in _copies(found, floors):
        worst["copies"] = max(worst.get("copies", 0.0), error)
        if not error <= RTOL:
            name = f"{key[2] or key[1]} on rank {rank}"
            differences.append(Difference((key[0], "copies", name), error, None, want.get(key)))
    worst.setdefault("copies", 0.0)
    differences.sort(key=lambda each: _place(each.key))
    return got, {row: worst[row] for row in ROWS if row in worst}, differences


def _place(key: Key) -> tuple[int, float, int, str]:
    """Phases and rows in the order in which one follows from the other."""
    phase, what, name = key
    number = float(phase.split()[-1]) if phase[-1].isdigit() else 0.0
    stage = 0 if phase == "start" else 3 if phase == "held out" else 1 if phase.startswith("resumed") else 2
    return stage, number, ROWS.index(what), name


def _difference(key: Key, got: Tensor | None, want: Tensor | None, floors: Mapping[Key, float]) -> Difference:
    if got is None or want is None or got.shape != want.shape:
        return Difference(key, float("inf"), got, want)
    have, aim = got.double(), want.double()
    size, distance = aim.norm().item(), (have - aim).norm().item()
    error = distance / max(size, floors[_group(key)], 1e-300) if distance == distance else float("inf")
    ratio = ((have * aim).sum() / (aim * aim).sum()).item() if size else float("nan")
    rest = ((have - ratio * aim).norm() / have.norm().clamp(min=1e-300)).item() if size else float("nan")
    return Difference(key, error, got, want, ratio, rest)


def _owner(key: Key) -> str:
    """The weight that a tensor belongs to."""
    return key[2].rpartition(".")[0] if key[1] == "optimizer state" else key[2]


def _group(key: Key) -> Key:
    """Tensors of one kind: same phase, same what, and of optimizer states the same moment."""
    return (key[0], key[1], key[2].rpartition(".")[2] if key[1] == "optimizer state" else "")


def _floors(want: Mapping[Key, Tensor]) -> dict[Key, float]:
    out: dict[Key, float] = {}
    for key, value in want.items():
        out[_group(key)] = max(out.get(_group(key), 0.0), FLOOR * value.double().norm().item())
    return out


def _still(want: Mapping[Key, Tensor]) -> set[str]:
    """Names of weights that nothing pulls at in the first step."""
    sizes = {name: value.norm().item() for (phase, what, name), value in want.items() if what == "gradient"}
    largest = max(sizes.values(), default=0.0)
    return {name for name, size in sizes.items() if 0 < size < STILL * largest}


def _copies(found: Sequence[Found], floors: Mapping[Key, float]) -> Iterator[tuple[Key, int, float]]:
    """(key, rank, relative error) of every tensor that a rank holds beside the one that answers for it."""
    answers: dict[Key, tuple[float, float]] = {}
    for rank, each in enumerate(found):
        for key, mark in each.prints.items():
            first = answers.setdefault(key, mark)
            if first is not mark:
                apart = max(abs(mark[0] - first[0]), abs(mark[1] - first[1]))
                yield key, rank, apart / max(first[0], floors.get(_group(key), 0.0), 1e-300)


def first_in_order(differences: Sequence[Difference], order: Sequence[str]) -> tuple[str, str]:
    """The first and the last weight, as the forward pass meets them, among those that differ; empty without any."""
    place = {name: index for index, name in enumerate(order)}
    names = sorted({each.name for each in differences if each.name in place}, key=place.__getitem__)
    return (names[0], names[-1]) if names else ("", "")


def whole_norm(tensors: Mapping[str, Tensor]) -> float:
    return torch.stack([value.double().norm() for value in tensors.values()]).norm().item() if tensors else 0.0
