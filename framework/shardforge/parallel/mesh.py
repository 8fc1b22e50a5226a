"""Layout to DeviceMesh, with a handle for each group of axes that a pass needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardforge.core.errors import LayoutError
from shardforge.core.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """One rank's view of the mesh of a layout."""

    layout: Layout
    whole: DeviceMesh
    fsdp: DeviceMesh  # 1-D (dp_shard), or 2-D (dp_replicate, dp_shard) with replicas
    data: ProcessGroup  # ranks that read different sequences

    @property
    def tp(self) -> DeviceMesh:
        return self.whole["tp"]

    def coordinate(self, axis: str) -> int:
        return self.whole.get_local_rank(axis)

    @property
    def data_rank(self) -> int:
        return self.coordinate("dp_replicate") * self.layout.dp_shard + self.coordinate("dp_shard")


def build(layout: Layout, device_type: str) -> Mesh:
    """A collective call: every rank of the world makes the same mesh. LayoutError when the world has another size."""
    if dist.get_world_size() != layout.world_size:
        raise LayoutError(
            f"the layout {layout} needs {layout.world_size} ranks, this job has {dist.get_world_size()}",
            "parallel",
            f"start {layout.world_size} processes, or set parallel.dp_shard so that the product is "
            f"{dist.get_world_size()}",
        )
    whole = init_device_mesh(device_type, layout.shape, mesh_dim_names=layout.axes)
    data = whole["dp_replicate", "dp_shard"]._flatten("data").get_group()
    fsdp = whole["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else whole["dp_shard"]
    return Mesh(layout, whole, fsdp, data)
