"""Layout to DeviceMesh: one root over all ranks, seen as dense axes, as expert axes, and as groups that passes need."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, device_mesh
from torch.distributed.device_mesh import DeviceMesh

from shardforge.core.errors import LayoutError
from shardforge.core.layout import AXES, EXPERT_AXES, Layout


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh of a layout."""

    layout: Layout
    whole: DeviceMesh  # the dense axes
    fsdp: DeviceMesh  # 1-D over dp_shard x cp, or 2-D (dp_replicate, dp_shard x cp) with replicas
    expert: DeviceMesh  # 2-D (ep, etp)
    expert_fsdp: DeviceMesh  # 1-D (efsdp), or 2-D (dp_replicate, efsdp) with replicas
    data: ProcessGroup  # ranks of a stage with different tokens: dp_replicate x dp_shard x cp
    sequence: ProcessGroup  # ranks of a stage that share each sequence: cp x tp
    experts: ProcessGroup  # ranks that together hold all experts once: ep x etp

    @property
    def tp(self) -> DeviceMesh:
        return self.whole["tp"]

    def group(self, axis: str) -> ProcessGroup:
        """The ranks along an axis, dense or expert."""
        return (self.whole if axis in AXES else self.expert).get_group(axis)

    def coordinate(self, axis: str) -> int:
        return (self.whole if axis in AXES else self.expert).get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(dist.get_rank())


def build(layout: Layout, device_type: str) -> Mesh:
    """A collective call: every rank of the world makes the same mesh. LayoutError when the world has another size."""
    if dist.get_world_size() != layout.world_size:
        raise LayoutError(
            f"the layout {layout} needs {layout.world_size} ranks, this job has {dist.get_world_size()}",
            "parallel",
            f"start {layout.world_size} processes, or set parallel.dp_shard so that the product is "
            f"{dist.get_world_size()}",
        )
    root = DeviceMesh(device_type, torch.tensor(layout.placed(), dtype=torch.int), mesh_dim_names=("world",))
    axes = ("pp", "dp_replicate", *layout.inside)  # torch sorts the ranks of a group: they must ascend in every mesh
    whole = root._unflatten(0, tuple(map(layout.degree, axes)), axes)
    sparse = root._unflatten(0, layout.expert_shape, EXPERT_AXES)
    rows = tuple(axis for axis in layout.inside if axis != "tp")
    shards = whole[rows]._flatten("fsdp")
    return Mesh(
        layout,
        whole,
        fsdp=_replicated(whole, shards),
        expert=sparse["ep", "etp"],
        expert_fsdp=_replicated(sparse, sparse["efsdp"]),
        data=whole[("dp_replicate", *rows)]._flatten("data").get_group(),
        sequence=whole[tuple(axis for axis in layout.inside if axis != "dp_shard")]._flatten("sequence").get_group(),
        experts=sparse["ep", "etp"]._flatten("experts").get_group(),
    )


def share_groups() -> None:
    """From now on this process makes one group of each set of ranks, and one mesh of each layout. For pools that build
    many layouts: a gloo group has threads that wake a hundred times a second. In training each axis has its own group,
    so that its collectives need not wait for another axis's."""
    global build
    build = functools.cache(build)
    made: dict[tuple, ProcessGroup] = {}

    def new_group(ranks: list[int], **options: Any) -> ProcessGroup:
        key = (tuple(ranks), options.get("backend"))
        if key not in made:
            made[key] = dist.new_group(ranks, **options)
        return made[key]

    device_mesh.new_group = new_group  # type: ignore[attr-defined]


def _replicated(mesh: DeviceMesh, shards: DeviceMesh) -> DeviceMesh:
    replicas = mesh["dp_replicate"]
    return DeviceMesh._concatenate([replicas, shards]) if replicas.size() > 1 else shards
