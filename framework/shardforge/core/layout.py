"""Which mesh axis splits which weight dimension. Pure data: no torch, no process group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import product

from shardforge.core.dims import Dim
from shardforge.core.errors import LayoutError
from shardforge.core.options import option

RULES: Mapping[str, str] = {"heads": "tp", "kv_heads": "tp", "ffn": "tp", "vocab": "tp"}
"""Name of a weight dimension -> the mesh axis that splits it."""

SHORT = {"dp_replicate": "rep", "dp_shard": "dp", "tp": "tp"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism. Ranks are numbered with tp innermost, dp_replicate outermost."""

    dp_replicate: int = option(1, "copies of the sharded model (HSDP replicas)", at_least=1)
    dp_shard: int = option(1, "ranks that share one copy of weights, gradients and optimizer states (FSDP)", at_least=1)
    tp: int = option(1, "ranks that split heads, ffn and vocabulary, and the sequence between them", at_least=1)

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(field.name for field in fields(self))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in self.axes)

    @property
    def world_size(self) -> int:
        size = 1
        for degree in self.shape:
            size *= degree
        return size

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences of one batch."""
        return self.dp_replicate * self.dp_shard

    def degree(self, axis: str) -> int:
        return getattr(self, axis)

    def split(self, dims: tuple[Dim, ...]) -> dict[str, int]:
        """Mesh axis -> index of the tensor dimension that it splits, for one weight."""
        out: dict[str, int] = {}
        for index, dim in enumerate(dims):
            axis = RULES.get(dim.name)
            if axis is None or self.degree(axis) == 1:
                continue
            if dim.count % self.degree(axis):
                fitting = self.fitting(axis, dim.count)
                raise LayoutError(
                    f"{dim.name}={dim.count} cannot be split {self.degree(axis)} ways over {axis}",
                    f"parallel.{axis}",
                    f"{axis} must divide {dim.count}; {axis}={fitting} keeps the same {self.world_size} ranks "
                    f"with dp_shard={self.dp_shard * self.degree(axis) // fitting}",
                )
            out[axis] = index
        return out

    def fitting(self, axis: str, count: int) -> int:
        """The largest degree of `axis` that divides both `count` and the present degree."""
        degree = self.degree(axis)
        return max(n for n in range(1, degree + 1) if count % n == 0 and degree % n == 0)

    def local_shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        """Shape of one rank's piece before data-parallel sharding."""
        parts = {index: self.degree(axis) for axis, index in self.split(dims).items()}
        return tuple(dim.size // parts.get(index, 1) for index, dim in enumerate(dims))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Mesh axis -> position of `rank` along it."""
        out: dict[str, int] = {}
        for axis in reversed(self.axes):
            rank, out[axis] = divmod(rank, self.degree(axis))
        return {axis: out[axis] for axis in self.axes}

    def ranks(self, axis: str, of: int) -> tuple[int, ...]:
        """Members of the group of rank `of` along `axis`, in order."""
        here = self.coordinates(of)
        out = []
        for rank, place in enumerate(product(*(range(n) for n in self.shape))):
            where = dict(zip(self.axes, place, strict=True))
            if all(where[other] == here[other] for other in self.axes if other != axis):
                out.append(rank)
        return tuple(out)

    def __str__(self) -> str:
        parts = [f"{SHORT[axis]}{self.degree(axis)}" for axis in self.axes if self.degree(axis) > 1]
        return "-".join(parts) or "one"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that prints as `text`: "rep2-dp2-tp2"; "one" is a single process."""
        long = {short: axis for axis, short in SHORT.items()}
        degrees: dict[str, int] = {}
        for part in text.split("-") if text != "one" else ():
            name = part.rstrip("0123456789")
            if name not in long or name == part or long[name] in degrees or int(part[len(name) :]) < 1:
                raise LayoutError(f"cannot read layout {text!r}", "layout", "write it like rep2-dp2-tp2")
            degrees[long[name]] = int(part[len(name) :])
        return cls(**degrees)
