"""Tensor and sequence parallelism: weights split by their dims, and collectives at the borders of the slots.

             norm            gather            mixer or ffn            scatter_sum   (something split inside)
[b, s/tp, h] ----> [b, s/tp, h] ----> [b, s, h] ----> [b, s, h] partial ----> [b, s/tp, h]
                                                       [b, s, h] whole   ----> own slice   (nothing split inside)

Between slots each rank holds its own positions, inside a slot its own heads or channels. A weight that is whole on
each rank therefore always sees a part of the work, and its gradient is a partial sum (nn.module.local says so).

Fewer key/value heads than ranks: tp / kv_heads ranks work on each of them. Weights over these heads are then whole on
each rank, which uses the rows of one head; gradients of ranks that share a head add up as those of any whole weight.
It costs memory, kv_heads - 1 times the weights of one head on each rank before FSDP shards them, and an all-reduce of
their gradients over tp: with kv_heads=8, head_dim=128, hidden=8192 and bfloat16, 28 MiB for the k and v of a layer.

With `overlap` the collectives of slots that allow it run in pieces beside the matmuls that they feed (nn.overlap).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardforge.core.errors import LayoutError
from shardforge.core.layout import REPEATED, RULES, Layout
from shardforge.nn import collectives
from shardforge.nn.head import VocabSplit
from shardforge.nn.linear import Linear, Table
from shardforge.nn.module import Declared, Module, declared, tagged
from shardforge.nn.overlap import Arriving, arriving_product, product_scatter_sum
from shardforge.parallel.mesh import Mesh


def apply(model: nn.Module, mesh: Mesh, *, overlap: bool = False) -> None:
    """Split what the layout's rules split over tp and put the boundaries in place; LayoutError where that cannot be."""
    if mesh.layout.tp == 1:
        return
    group, part = mesh.tp.get_group(), mesh.coordinate("tp")
    weights = list(_dense(model))
    split = {item.module for item in weights if "tp" in mesh.layout.split(item.dims)}
    for item in weights:
        if _repeated(item, mesh.layout):
            share(item, mesh.layout, group, part)
    place(model, mesh)
    for module in split:
        adapt(module, mesh.layout, group, part)
    enclose(model, split, group, overlap)
    for head in tagged(model, "head"):
        split_vocabulary(model, VocabSplit(part * head.operand().shape[0], group))
    for module in tagged(model, "dropout"):
        module.part, module.parts = part, mesh.layout.tp


def place(model: nn.Module, mesh: Mesh) -> None:
    """Make every declared weight a DTensor over tp."""
    for item in _dense(model):
        axes = mesh.layout.split(item.dims)
        placement = Shard(axes["tp"]) if "tp" in axes else Replicate()
        piece = distribute_tensor(item.weight.detach(), mesh.tp, [placement], src_data_rank=None)
        setattr(item.module, item.name, nn.Parameter(piece))


def adapt(module: nn.Module, layout: Layout, group: ProcessGroup, part: int) -> None:
    """Tell a module with a split weight what it must know: first row, sum of statistics, who adds whole terms."""
    if isinstance(module, Table):
        module.first = part * (module.rows // layout.tp)
    if hasattr(module, "total"):
        module.total = partial(collectives.all_sum, group=group)
    if part > 0 and (_sums(module, layout) or isinstance(module, Table)) and hasattr(module, "once"):
        module.once = 0.0


def share(item: Declared, layout: Layout, group: ProcessGroup, part: int) -> None:
    """Tell a module whose weight is over fewer heads than ranks which of them this rank works on.

    Statistics over all heads count every head once, though several ranks send it.
    """
    module, heads = item.module, item.dims[0]
    if not hasattr(module, "rows") or heads.name not in REPEATED:
        dims = " x ".join(map(str, item.dims))
        raise LayoutError(
            f"{item.fqn} ({dims}) has fewer heads than tp={layout.tp}, and {type(module).__name__} reads it whole",
            "parallel.tp",
            "a tp that divides the heads splits them; or read the weight with local(weight, self.rows)",
        )
    first = part * heads.count // layout.tp
    module.rows = slice(first * heads.unit, (first + 1) * heads.unit)
    if hasattr(module, "total"):
        module.total = partial(_sum_once, group, layout.tp // heads.count)


def enclose(model: nn.Module, split: set[nn.Module], group: ProcessGroup, overlap: bool) -> None:
    """Put a collective before and after every slot that works on the whole sequence, and after the embedding."""
    enter, add_up, own = (partial(hook, group) for hook in (_enter, _add_up, _own))  # one compiled block serves all

    def summed(module: nn.Module) -> bool:
        return any(inner in split for inner in module.modules())

    for module in _gathering(model):
        if overlap and module.enters:
            module.register_forward_pre_hook(partial(_arrive, group))
            for name in module.enters:
                module.get_submodule(name).product = arriving_product
        else:
            module.register_forward_pre_hook(enter)
        if overlap and module.leaves and module.get_submodule(module.leaves) in split:
            module.get_submodule(module.leaves).product = partial(product_scatter_sum, group)
        else:
            module.register_forward_hook(add_up if summed(module) else own)
    for module in tagged(model, "embed"):
        module.register_forward_hook(add_up if summed(module) else own)


def split_vocabulary(model: nn.Module, split: VocabSplit) -> None:
    """Objectives and heads read the whole sequence and make the logits of this rank's part of the vocabulary."""
    for module in tagged(model, "objective"):
        module.register_forward_pre_hook(partial(_enter, split.group))
        module.split = split
    for module in tagged(model, "head"):
        module.register_forward_pre_hook(partial(_enter, split.group))
        module.register_forward_hook(partial(_join_vocabulary, split.group))


def _gathering(model: nn.Module) -> list[Module]:
    slots = (module for slot in ("mixer", "ffn") for module in tagged(model, slot))
    return [module for module in slots if module.boundary == "gather"]


def _dense(model: nn.Module) -> Iterator[Declared]:
    """All weights but those of experts, which lie on a mesh of their own."""
    return (item for item in declared(model) if all(RULES.get(dim.name) != "ep" for dim in item.dims))


def _repeated(item: Declared, layout: Layout) -> bool:
    return any(dim.name in REPEATED and layout.repeated(dim) for dim in item.dims)


def _sums(module: nn.Module, layout: Layout) -> bool:
    """Whether the results of this module are partial sums over tp: the input channels of its weight are split."""
    return isinstance(module, Linear) and layout.split(module.declared["weight"][0]).get("tp") == 1


def _sum_once(group: ProcessGroup, copies: int, x: Tensor) -> Tensor:
    return collectives.all_sum(x, group) / copies


def _enter(group: ProcessGroup, module: nn.Module, args: tuple) -> tuple:
    return (collectives.gather(args[0], group, 1), *args[1:])


def _arrive(group: ProcessGroup, module: nn.Module, args: tuple) -> tuple:
    return (Arriving(group, args[0]), *args[1:])


def _add_up(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """Back to own positions where something is split inside: each rank has a part of every sum."""
    return collectives.scatter_sum(y, group, 1)


def _own(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    """Back to own positions where nothing is split inside: each rank has the whole."""
    return y.chunk(group.size(), 1)[group.rank()]


def _join_vocabulary(group: ProcessGroup, module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return collectives.gather(y, group, 2)
