"""Tensor and sequence parallelism: weights split by their dims, and collectives at the borders of the slots.

             norm            gather            mixer or ffn            scatter_sum   (something split inside)
[b, s/tp, h] ----> [b, s/tp, h] ----> [b, s, h] ----> [b, s, h] partial ----> [b, s/tp, h]
                                                       [b, s, h] whole   ----> own slice   (nothing split inside)

Between slots each rank holds its own positions, inside a slot its own heads or channels. A weight that is whole on
each rank therefore always sees a part of the work, and its gradient is a partial sum (nn.module.local says so).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardforge.core.layout import Layout
from shardforge.nn import collectives
from shardforge.nn.head import VocabSplit
from shardforge.nn.linear import Linear, Table
from shardforge.nn.module import declared, tagged
from shardforge.parallel.mesh import Mesh


def apply(model: nn.Module, mesh: Mesh) -> None:
    """Split what the layout's rules split over tp and put the boundaries in place."""
    if mesh.layout.tp == 1:
        return
    group, part = mesh.tp.get_group(), mesh.coordinate("tp")
    split = place(model, mesh)
    enter, add_up, own = (partial(hook, group) for hook in (_enter, _add_up, _own))  # one compiled block serves all

    def leave(module: nn.Module) -> None:
        module.register_forward_hook(add_up if any(inner in split for inner in module.modules()) else own)

    for slot in ("mixer", "ffn"):
        for module in tagged(model, slot):
            if module.boundary == "gather":
                module.register_forward_pre_hook(enter)
                leave(module)
    for module in tagged(model, "embed"):
        leave(module)
    for module in tagged(model, "objective"):
        module.register_forward_pre_hook(enter)
        module.split = VocabSplit(part * model.head.operand().shape[0], group)
    for module in tagged(model, "head"):
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(partial(_join_vocabulary, group))
    for module in tagged(model, "dropout"):
        module.part, module.parts = part, mesh.layout.tp
    for module in split:
        adapt(module, mesh.layout, group, part)


def place(model: nn.Module, mesh: Mesh) -> set[nn.Module]:
    """Make every declared weight a DTensor over tp. Returns the modules that have a split weight."""
    split = set()
    for item in declared(model):
        axes = mesh.layout.split(item.dims)
        placement = Shard(axes["tp"]) if "tp" in axes else Replicate()
        if "tp" in axes:
            split.add(item.module)
        piece = distribute_tensor(item.weight.detach(), mesh.tp, [placement], src_data_rank=None)
        setattr(item.module, item.name, nn.Parameter(piece))
    return split


def adapt(module: nn.Module, layout: Layout, group: ProcessGroup, part: int) -> None:
    """Tell a module with a split weight what it must know: first row, sum of statistics, who adds whole terms."""
    if isinstance(module, Table):
        module.first = part * (module.rows // layout.tp)
    if hasattr(module, "total"):
        module.total = partial(collectives.all_sum, group=group)
    rows_are_split = isinstance(module, Linear) and layout.split(module.declared["weight"][0]).get("tp") == 1
    if part > 0 and (rows_are_split or isinstance(module, Table)) and hasattr(module, "once"):
        module.once = 0.0


def _enter(group: ProcessGroup, module: nn.Module, args: tuple) -> tuple:
    return (collectives.gather(args[0], group, 1), *args[1:])


def _add_up(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """Back to own positions where something is split inside: each rank has a part of every sum."""
    return collectives.scatter_sum(y, group, 1)


def _own(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """Back to own positions where nothing is split inside: each rank has the whole."""
    return y.chunk(group.size(), 1)[group.rank()]


def _join_vocabulary(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return collectives.gather(y, group, 2)
