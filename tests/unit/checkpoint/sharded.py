"""A small model under any layout of these tests, with weights and moments whose every bit is known."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shardforge.checkpoint import state
from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError
from shardforge.core.layout import Layout
from shardforge.recipe.schema import CheckpointConfig

TP_DIM = {"up": 0, "down": 1, "table": 0}


class Net(nn.Module):
    """`up` and `table` are split twice along one dimension by dp x tp; `odd` leaves some ranks with nothing."""

    def __init__(self, seed: int, width: int = 12):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randn(8, 6))
        self.up = nn.Parameter(torch.randn(width, 6))
        self.down = nn.Parameter(torch.randn(6, width, dtype=torch.float64))
        self.norm = nn.Parameter(torch.randn(6, dtype=torch.bfloat16))
        self.odd = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.head = nn.Module()
        self.head.weight = self.table


@cache
def mesh_of(layout: Layout) -> DeviceMesh:
    return init_device_mesh("cpu", layout.shape, mesh_dim_names=layout.axes)


def build(layout: Layout, seed: int, width: int = 12) -> tuple[Net, torch.optim.Optimizer]:
    """The model of `seed` split by `layout`; its AdamW moments are 2 and 4 times the weights, its step is `seed`."""
    net = Net(seed, width)
    if layout.world_size > 1:
        mesh = mesh_of(layout)
        for name, dim in TP_DIM.items() if layout.tp > 1 else ():
            split = nn.Parameter(distribute_tensor(getattr(net, name).data, mesh["tp"], [Shard(dim)]))
            setattr(net, name, split)
        net.head.weight = net.table
        if layout.data_ranks > 1:
            axes = tuple(axis for axis in ("dp_replicate", "dp_shard") if layout.degree(axis) > 1)
            fully_shard(net, mesh=mesh[axes])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    state.materialise(optimizer)
    for weight in net.parameters():
        kept = optimizer.state[weight]
        kept["step"].fill_(seed)
        piece(kept["exp_avg"]).copy_(2 * piece(weight.detach()))
        piece(kept["exp_avg_sq"]).copy_(4 * piece(weight.detach()))
    return net, optimizer


def piece(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def store(path: Path, net: nn.Module, **cfg: object) -> Store:
    return Store(path, CheckpointConfig(**cfg), describe={"model": state.table(net)})


def save(path: Path, layout: Layout, seed: int) -> None:
    """Commit the model of `seed` as step `seed`."""
    net, optimizer = build(layout, seed)
    keeper = store(path, net)
    keeper.save(seed, state.collect(net, optimizer), {"seed": seed}, wait=True)
    keeper.close()


def differing(path: Path, layout: Layout, seed: int) -> list[str]:
    """Load the newest step over another model; the tensors of this rank that are not bit for bit those of `seed`."""
    net, optimizer = build(layout, seed + 1)
    tensors = state.collect(net, optimizer)
    keeper = store(path, net)
    assert keeper.load_latest(tensors) == seed
    keeper.close()
    state.restore(net, optimizer, tensors)
    return [
        name
        for (name, mine), theirs in zip(
            state.collect(net, optimizer).items(), state.collect(*build(layout, seed)).values(), strict=True
        )
        if not torch.equal(piece(mine), piece(theirs))
    ]


def refusal(path: Path, layout: Layout, width: int) -> tuple[str, bool]:
    """What loading into a model of another width says, and whether all its tensors are as before."""
    net, optimizer = build(layout, 5, width)
    tensors = state.collect(net, optimizer)
    before = {name: piece(tensor).clone() for name, tensor in tensors.items()}
    keeper = store(path, net)
    try:
        keeper.load_latest(tensors)
        told = ""
    except CheckpointError as error:
        told = str(error)
    keeper.close()
    return told, all(torch.equal(piece(tensors[name]), was) for name, was in before.items())


def apart(path: Path, wanted: tuple[str, ...]) -> tuple[str, bool]:
    """Two ranks save a tensor each, "model.0" and "model.1", and then ask for one of `wanted` each: the refusal, and
    whether the tensor is as it was saved."""
    rank = dist.get_rank()
    describe = {"model": {f"{n}": {"shape": [3 + n], "dtype": "float32"} for n in range(2)}}
    keeper = Store(path, CheckpointConfig(), describe=describe)
    keeper.save(1, {f"model.{rank}": torch.full((3 + rank,), 5.0 + rank)}, {}, wait=True)
    number = int(wanted[rank])
    mine = {f"model.{number}": torch.zeros(3 + number)}
    try:
        keeper.load_latest(mine)
        told = ""
    except CheckpointError as error:
        told = str(error)
    keeper.close()
    return told, bool((mine[f"model.{number}"] == 5.0 + number).all())
