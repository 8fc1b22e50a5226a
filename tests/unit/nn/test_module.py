from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shardforge.core.dims import Dim
from shardforge.core.layout import Layout
from shardforge.nn.init import zeros
from shardforge.nn.module import Module, declared, local, tagged
from shardforge.parallel import mesh

H, F = Dim("hidden", 4), Dim("ffn", 6)


class Inner(Module):
    slot = "ffn"

    def __init__(self) -> None:
        super().__init__()
        self.declare("weight", F, H, init=zeros)
        self.declare("bias", F, init=zeros)


class Outer(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain, self.second = Inner(), nn.Linear(2, 2), Inner()
        self.declare("gain", H, init=zeros)


def whole_on_each_rank() -> tuple[list[float], list[float]]:
    """Gradient of a weight that two ranks hold whole and use once and twice; and the gradient of a split one."""
    here = mesh.build(Layout(tp=2), "cpu")
    part = here.coordinate("tp")
    gradients = []
    for place in (Replicate(), Shard(0)):
        weight = nn.Parameter(distribute_tensor(torch.ones(2, 1), here.tp, [place]))
        (local(weight) * (part + 1.0)).sum().backward()
        gradients.append(weight.grad.full_tensor().flatten().tolist())
    return gradients[0], gradients[1]


def test_weights_are_listed_by_full_name_in_order_of_construction():
    assert [item.fqn for item in declared(Outer())] == [
        "gain",
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    ]


def test_a_declared_weight_has_the_sizes_of_its_dims():
    item = next(item for item in declared(Outer()) if item.fqn == "first.weight")
    assert tuple(item.weight.shape) == (6, 4) and item.dims == (F, H) and item.count == 24


def test_passes_find_modules_by_their_slot():
    model = Outer()
    assert list(tagged(model, "ffn")) == [model.first, model.second]


def test_local_returns_a_plain_weight_itself():
    weight = Inner().weight
    assert local(weight) is weight


def test_a_weight_whole_on_each_rank_has_the_sum_of_the_ranks_gradients(ranks):
    assert ranks(2).run(whole_on_each_rank) == [([3.0, 3.0], [1.0, 2.0])] * 2
