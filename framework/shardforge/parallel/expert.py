"""Expert parallelism: experts spread over ep, each split over etp, over the same ranks as the other weights.

           own positions              experts of all               own positions
[b, s/tp, h] ----------> dispatch ---> of ep x etp ---> back ----> [b, s/tp, h]

Where each rank holds other experts, every rank of ep x etp brings its own tokens, so the gradient of an expert is
whole inside that group; only replicas of the group (efsdp, dp_replicate) hold parts of the sum. Results of etp ranks
are added up, so the first of them alone adds the bias that follows the split width.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardforge.core.errors import LayoutError
from shardforge.core.layout import RULES
from shardforge.nn.dispatch import Dispatch
from shardforge.nn.module import declared, tagged
from shardforge.nn.tokens import TokenSplit
from shardforge.parallel.dispatchers import deepep
from shardforge.parallel.dispatchers.exchange import Exchange, Widened
from shardforge.parallel.dispatchers.gather import Gather
from shardforge.parallel.dispatchers.two_hop import TwoHop
from shardforge.parallel.mesh import Mesh

Kind = Literal["auto", "gather", "exchange", "two_hop", "deepep"]
"""auto: exchange, or gather where only etp splits the experts. Each took less CPU time than the other there, for 1 to 8
experts a token, forward and backward, on 2 and 4 processes over gloo (1024 tokens of 512 float32, 22 November 2026)."""


def apply(model: nn.Module, mesh: Mesh, dispatch: Kind = "auto", ranks_per_node: int | None = None) -> None:
    """Split the experts, and tell each module that dispatches how tokens reach them and which tokens are here.

    `ranks_per_node` counts the ranks of one ep group on a node, for two_hop; None finds them by LOCAL_WORLD_SIZE.
    """
    layout = mesh.layout
    senders = [module for module in model.modules() if hasattr(module, "dispatch")]
    group = mesh.sequence if layout.cp * layout.tp > 1 else None
    for module in senders:
        module.split = TokenSplit(mesh.coordinate("tp"), layout.tp, group)
    if layout.ep * layout.etp == 1:
        return
    hidden = max((module.hidden for module in tagged(model, "experts")), default=0)
    make = maker(dispatch, mesh, hidden, ranks_per_node)  # collective, also on a stage of a pipeline without experts
    for module in senders:
        module.dispatch = make(module.dispatch.experts)
    for module in tagged(model, "experts"):
        module.once = 1.0 if mesh.coordinate("etp") == 0 else 0.0
    place(model, mesh)


def place(model: nn.Module, mesh: Mesh) -> None:
    """Make every weight over experts a DTensor over (ep, etp); LayoutError where a dimension cannot be split.

    A dimension with a rule is split also where its axis has one rank: a gradient is a partial sum only of the rest.
    """
    for item in declared(model):
        dims = {RULES.get(dim.name): index for index, dim in enumerate(item.dims)}
        if "ep" not in dims:
            continue
        mesh.layout.split(item.dims)
        placements = [Shard(dims[axis]) if axis in dims else Replicate() for axis in ("ep", "etp")]
        piece = distribute_tensor(item.weight.detach(), mesh.expert, placements, src_data_rank=None)
        setattr(item.module, item.name, nn.Parameter(piece))


def maker(kind: Kind, mesh: Mesh, hidden: int, ranks_per_node: int | None) -> Callable[[int], Dispatch]:
    """Number of experts -> the dispatch for them, of tokens of `hidden` numbers; all of a mesh share their groups."""
    layout, ep = mesh.layout, mesh.group("ep")
    if kind == "auto":
        kind = "exchange" if layout.ep > 1 else "gather"
    if kind == "gather":
        own = mesh.coordinate("ep")
        return lambda experts: Gather(mesh.experts, experts // layout.ep, own * experts // layout.ep)
    if kind == "exchange":
        return lambda experts: _widened(Exchange(ep, experts), mesh)
    if kind == "deepep":
        return lambda experts: _widened(deepep.DeepEP(deepep.buffer(ep, hidden), experts), mesh)
    hops = node_mesh(mesh, ranks_per_node or ranks_on_a_node(mesh))
    across, inside = hops.get_group(0), hops.get_group(1)

    def two_hop(experts: int) -> Dispatch:
        here = experts // hops.size(0)
        return _widened(TwoHop(across, here, Exchange(inside, here)), mesh)

    return two_hop


def ranks_on_a_node(mesh: Mesh) -> int:
    """Ranks of the ep group that share a node, by LOCAL_WORLD_SIZE; LayoutError when it is not the same on each."""
    size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    homes = [rank // size for rank in dist.get_process_group_ranks(mesh.group("ep"))]
    count = homes.count(homes[0])
    if homes != [homes[place - place % count] for place in range(len(homes))]:
        raise _uneven(mesh, count)
    return count


@functools.cache
def node_mesh(mesh: Mesh, ranks_per_node: int) -> DeviceMesh:
    """The ep group as a mesh of (nodes, ranks of each). Its groups are made at the first call, which is collective."""
    ep = mesh.layout.ep
    if ep % ranks_per_node:
        raise _uneven(mesh, ranks_per_node)
    return mesh.expert["ep"]._unflatten(0, (ep // ranks_per_node, ranks_per_node), ("ep_across", "ep_inside"))


def _uneven(mesh: Mesh, count: int) -> LayoutError:
    fits = math.gcd(mesh.layout.ep, count)
    return LayoutError(
        f"two_hop needs nodes with as many ranks each of ep={mesh.layout.ep}, not {count} on the first",
        "engine.dispatch",
        f"dispatch: exchange; or an ep and an order of axes that put the same number on each node, like {fits}",
    )


def _widened(dispatch: Dispatch, mesh: Mesh) -> Dispatch:
    return Widened(mesh.group("etp"), dispatch) if mesh.layout.etp > 1 else dispatch
