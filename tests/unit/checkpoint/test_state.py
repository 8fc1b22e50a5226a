from __future__ import annotations

import pytest
import torch
from torch import nn

from shardforge.checkpoint import state
from shardforge.core.dims import Dim
from shardforge.core.errors import CheckpointError
from shardforge.core.layout import Layout
from shardforge.nn.module import Module
from tests.unit.checkpoint import sharded

OPTIMIZERS = {
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1, eps=0.0),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1, fused=True),
    "amsgrad": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(0.1), amsgrad=True, foreach=False),
    "momentum": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.1, centered=True),
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(4, 3))
        self.head = nn.Module()
        self.head.weight = self.table
        self.bias = nn.Parameter(torch.randn(3))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def train(net: Tied, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (net.table.sin().sum() + (net.bias * net.head.weight[0]).sum()).backward()
        optimizer.step()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


def test_names_are_weights_persistent_buffers_and_moments_with_tied_weights_once():
    net = Tied()
    assert list(state.collect(net, OPTIMIZERS["adamw"](net))) == [
        *("model.table", "model.bias", "model.kept"),
        *(f"optim.{weight}.{key}" for weight in ("table", "bias") for key in ("step", "exp_avg", "exp_avg_sq")),
    ]


def test_tensors_share_memory_with_the_model():
    net = Tied()
    state.collect(net)["model.table"].zero_()
    assert net.table.abs().sum().item() == 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_collecting_leaves_weights_and_gradients_bit_for_bit(kind):
    net = Tied()
    with torch.no_grad():
        net.bias[0] = -0.0
    net.table.grad = torch.randn(4, 3)
    before = bits(dict(net.named_parameters())), bits({"grad": net.table.grad})
    state.collect(net, OPTIMIZERS[kind](net))
    assert (bits(dict(net.named_parameters())), bits({"grad": net.table.grad})) == before
    assert net.bias.grad is None


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_collecting_before_the_first_step_does_not_change_the_run(kind):
    plain, collected = Tied(), Tied()
    first, second = OPTIMIZERS[kind](plain), OPTIMIZERS[kind](collected)
    state.collect(collected, second)
    train(plain, first, 3)
    train(collected, second, 3)
    assert bits(dict(collected.named_parameters())) == bits(dict(plain.named_parameters()))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_restored_run_goes_on_bit_for_bit(kind):
    whole, stopped, resumed = Tied(), Tied(), Tied()
    first, second, third = (OPTIMIZERS[kind](net) for net in (whole, stopped, resumed))
    train(whole, first, 4)
    train(stopped, second, 2)
    state.restore(resumed, third, {k: v.clone() for k, v in state.collect(stopped, second).items()})
    train(resumed, third, 2)
    assert bits(state.collect(resumed, third)) == bits(state.collect(whole, first))


def test_state_that_exists_is_not_created_again():
    net = Tied()
    optimizer = OPTIMIZERS["adamw"](net)
    train(net, optimizer)
    before = bits(state.collect(net, optimizer))
    assert bits(state.collect(net, optimizer)) == before


def test_moments_of_split_weights_are_split_alike(ranks):
    assert ranks(4).run(moments_unlike_their_weights) == [[]] * 4


def moments_unlike_their_weights() -> list[str]:
    net, optimizer = sharded.build(Layout(dp_shard=2, tp=2), 1)
    tensors = state.collect(net, optimizer)
    return [
        name
        for name, weight in net.named_parameters()
        for key in ("exp_avg", "exp_avg_sq")
        if tensors[f"optim.{name}.{key}"].placements != weight.placements
    ]


def test_a_number_in_the_optimizer_comes_back_as_its_own_type():
    net = Tied()
    optimizer = OPTIMIZERS["sgd"](net)
    optimizer.state[net.bias] = {"count": 3, "scale": 0.1, "warm": True, "nothing": None}
    tensors = state.collect(net, optimizer)
    optimizer.state[net.bias].update(count=0, scale=0.0, warm=False)
    state.restore(net, optimizer, tensors)
    assert optimizer.state[net.bias] == {"count": 3, "scale": 0.1, "warm": True, "nothing": None}
    assert [type(value) for value in optimizer.state[net.bias].values()] == [int, float, bool, type(None)]


def test_an_object_in_the_optimizer_is_refused_by_name():
    net = Tied()
    optimizer = OPTIMIZERS["sgd"](net)
    optimizer.state[net.bias] = {"table": [1, 2]}
    with pytest.raises(CheckpointError, match=r"optim\.bias\.table is a list"):
        state.collect(net, optimizer)


@pytest.mark.parametrize("wrong", ["missing", "extra", "shape"])
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(wrong):
    net = Tied()
    before = bits(state.collect(net))
    tensors = {name: torch.zeros_like(tensor) for name, tensor in state.collect(net).items()}
    if wrong == "missing":
        del tensors["model.kept"]
    elif wrong == "extra":
        tensors["model.other"] = torch.zeros(1)
    else:
        tensors["model.kept"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="of the same model"):
        state.restore(net, None, tensors)
    assert bits(state.collect(net)) == before


def test_the_table_of_a_model_says_dims_shape_and_type():
    class Split(Module):
        def __init__(self) -> None:
            super().__init__()
            self.declare("weight", Dim("heads", 2, 3), Dim("hidden", 4), init=lambda key, index, dtype: index)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    assert state.table(Split()) == {
        "weight": {"dims": ["heads=2*3", "hidden=4"], "shape": [6, 4], "dtype": "float32"},
        "seen": {"dims": [], "shape": [], "dtype": "int64"},
    }
