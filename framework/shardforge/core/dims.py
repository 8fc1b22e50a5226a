"""Names for weight dimensions. No torch here: the planner and the launcher read these too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dim:
    """A named dimension of a weight: `count` pieces of `unit` numbers; a layout splits between pieces.

    `heads * head_dim` is one dimension that can be split between heads, never inside one.
    """

    name: str
    count: int
    unit: int = 1

    @property
    def size(self) -> int:
        return self.count * self.unit

    def __mul__(self, inner: Dim) -> Dim:
        return Dim(self.name, self.count, self.unit * inner.size)

    def __str__(self) -> str:
        return f"{self.name}={self.count}" + (f"*{self.unit}" if self.unit > 1 else "")


def role(dims: tuple[Dim, ...]) -> str:
    """What a weight of these dims is to an optimizer: "table", "matrix" or "vector". Many experts have one each."""
    if any(dim.name == "vocab" for dim in dims) and len(dims) > 1:
        return "table"
    return "matrix" if sum(dim.name != "expert" for dim in dims) > 1 else "vector"
