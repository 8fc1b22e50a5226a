"""Which mesh axis splits which weight dimension, and which rank stands where. Pure data: no torch, no process group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardforge.core.dims import Dim
from shardforge.core.errors import LayoutError
from shardforge.core.options import option

RULES: Mapping[str, str] = {
    "heads": "tp",
    "kv_heads": "tp",
    "ffn": "tp",
    "vocab": "tp",
    "expert": "ep",
    "expert_ffn": "etp",
}
"""Name of a weight dimension -> the mesh axis that splits it."""

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the dense weights; their product is the number of ranks."""

EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep", "etp")
"""Axes of the expert weights over the same ranks: in a stage and a replica, ep x etp ranks hold all experts once."""

SHORT = {"pp": "pp", "dp_replicate": "rep", "dp_shard": "dp", "cp": "cp", "tp": "tp", "ep": "ep", "etp": "etp"}
REPEATED = ("kv_heads",)
"""Dimensions that stay whole on each rank where they have fewer pieces than the axis has ranks."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism. `order` says how ranks are numbered; the innermost axis has neighbouring numbers."""

    pp: int = option(1, "stages of the pipeline", at_least=1)
    dp_replicate: int = option(1, "copies of the sharded model (HSDP replicas)", at_least=1)
    dp_shard: int = option(1, "ranks that share one copy of weights, gradients and optimizer states (FSDP)", at_least=1)
    cp: int = option(1, "ranks that share the positions of a sequence, attention included", at_least=1)
    tp: int = option(1, "ranks that split heads, ffn and vocabulary, and the sequence between them", at_least=1)
    ep: int = option(1, "ranks that share the experts, out of dp_shard x cp x tp", at_least=1)
    etp: int = option(1, "ranks that split each expert, out of dp_shard x cp x tp", at_least=1)
    order: str = option("pp-rep-dp-cp-tp", "axes from the outermost in; ranks that differ in the last are neighbours")

    def __post_init__(self) -> None:
        if sorted(self.order.split("-")) != sorted(SHORT[axis] for axis in AXES):
            raise LayoutError(f"cannot read the order {self.order!r}", "parallel.order", "write all of pp-rep-dp-cp-tp")
        inside = self.dp_shard * self.cp * self.tp
        if inside % (self.ep * self.etp):
            fits = (
                max(n for n in range(1, self.ep + 1) if inside % (n * self.etp) == 0) if inside % self.etp == 0 else 1
            )
            raise LayoutError(
                f"ep={self.ep} x etp={self.etp} must divide the {inside} ranks of dp_shard={self.dp_shard} x "
                f"cp={self.cp} x tp={self.tp}",
                "parallel.ep",
                f"ep={fits} works" if inside % self.etp == 0 else f"etp must divide {inside}",
            )

    @property
    def axes(self) -> tuple[str, ...]:
        return AXES

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.degree(axis) for axis in AXES)

    @property
    def efsdp(self) -> int:
        """Ranks that share one rank's experts, as dp_shard ranks share the other weights."""
        return self.dp_shard * self.cp * self.tp // (self.ep * self.etp)

    @property
    def expert_shape(self) -> tuple[int, ...]:
        """Degrees along `EXPERT_AXES`."""
        return (self.pp, self.dp_replicate, self.efsdp, self.ep, self.etp)

    @property
    def world_size(self) -> int:
        return math.prod(self.shape)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences of one batch."""
        return self.dp_replicate * self.dp_shard

    def degree(self, axis: str) -> int:
        return getattr(self, axis)

    def degrees(self) -> dict[str, int]:
        """Every degree that a recipe can set, by its name there."""
        return {axis: self.degree(axis) for axis in SHORT}

    def split(self, dims: tuple[Dim, ...]) -> dict[str, int]:
        """Mesh axis -> index of the tensor dimension that it splits, for one weight."""
        out: dict[str, int] = {}
        for index, dim in enumerate(dims):
            axis = RULES.get(dim.name)
            if axis is None or self.degree(axis) == 1 or self.repeated(dim):
                continue
            if dim.count % self.degree(axis):
                raise self.misfit(axis, dim)
            out[axis] = index
        return out

    def repeated(self, dim: Dim) -> bool:
        """Whether `dim` has fewer pieces than its axis has ranks, so that several ranks work on each piece."""
        degree = self.degree(RULES[dim.name])
        return dim.name in REPEATED and dim.count < degree and degree % dim.count == 0

    def misfit(self, axis: str, dim: Dim) -> LayoutError:
        degree, fitting = self.degree(axis), self.fitting(axis, dim.count)
        fix = f"{axis} must divide {dim.count}; {axis}={fitting} "
        if axis in AXES:
            fix += f"keeps the same {self.world_size} ranks with dp_shard={self.dp_shard * degree // fitting}"
        else:
            fix += "works on the same ranks"
        what = f"{dim.name}={dim.count} cannot be split {degree} ways over {axis}"
        return LayoutError(what, f"parallel.{axis}", fix)

    def fitting(self, axis: str, count: int) -> int:
        """The largest degree of `axis` that divides both `count` and the present degree."""
        return math.gcd(count, self.degree(axis))

    def local_shape(self, dims: tuple[Dim, ...]) -> tuple[int, ...]:
        """Shape of one rank's piece before data-parallel sharding."""
        parts = {index: self.degree(axis) for axis, index in self.split(dims).items()}
        return tuple(dim.size // parts.get(index, 1) for index, dim in enumerate(dims))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Mesh axis -> position of `rank` along it."""
        long = {short: axis for axis, short in SHORT.items()}
        out: dict[str, int] = {}
        for axis in reversed([long[short] for short in self.order.split("-")]):
            rank, out[axis] = divmod(rank, self.degree(axis))
        return {axis: out[axis] for axis in AXES}

    def expert_coordinates(self, rank: int) -> dict[str, int]:
        """The same over `EXPERT_AXES`."""
        here, inside = self.coordinates(rank), 0
        for axis in self.inside:
            inside = inside * self.degree(axis) + here[axis]
        inside, etp = divmod(inside, self.etp)
        efsdp, ep = divmod(inside, self.ep)
        return {"pp": here["pp"], "dp_replicate": here["dp_replicate"], "efsdp": efsdp, "ep": ep, "etp": etp}

    def data_rank(self, rank: int) -> int:
        """Which share of the sequences of a batch `rank` reads."""
        here = self.coordinates(rank)
        return here["dp_replicate"] * self.dp_shard + here["dp_shard"]

    @property
    def inside(self) -> tuple[str, ...]:
        """dp_shard, cp and tp from the outermost in. The ranks of a stage and a replica ascend in this order."""
        long = {short: axis for axis, short in SHORT.items()}
        return tuple(axis for axis in map(long.__getitem__, self.order.split("-")) if axis in AXES[2:])

    def placed(self) -> tuple[int, ...]:
        """The rank at each place of the mesh, places counted with pp outermost, then replicas, then along `inside`."""

        def place(rank: int) -> tuple[int, ...]:
            here = self.coordinates(rank)
            return (here["pp"], here["dp_replicate"], rank)

        return tuple(sorted(range(self.world_size), key=place))

    def ranks(self, axis: str, of: int) -> tuple[int, ...]:
        """Members of the group of rank `of` along `axis`, in order."""
        where = self.coordinates if axis in AXES else self.expert_coordinates
        here = where(of)
        out = []
        for rank in range(self.world_size):
            there = where(rank)
            if all(there[other] == here[other] for other in here if other != axis):
                out.append((there[axis], rank))
        return tuple(rank for _, rank in sorted(out))

    def __str__(self) -> str:
        parts = [f"{short}{self.degree(axis)}" for axis, short in SHORT.items() if self.degree(axis) > 1]
        return "-".join(parts) or "one"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that prints as `text`: "pp2-dp2-tp2"; "one" is a single process."""
        long = {short: axis for axis, short in SHORT.items()}
        degrees: dict[str, Any] = {}
        for part in text.split("-") if text != "one" else ():
            name = part.rstrip("0123456789")
            if name not in long or name == part or long[name] in degrees or int(part[len(name) :]) < 1:
                raise LayoutError(f"cannot read layout {text!r}", "layout", "write it like pp2-dp2-tp2")
            degrees[long[name]] = int(part[len(name) :])
        return cls(**degrees)
