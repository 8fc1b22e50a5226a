from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.optim import narrow
from shardforge.optim.narrow import NarrowAdamW

RATE, DECAY, EPS = 0.01, 0.1, 1e-8
SHAPES = {"table": (12, 6), "norm": (6,), "experts": (2, 3, 5)}
BETAS = (0.9, 0.95)


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


def optimizer(net: nn.Module, dtype: torch.dtype, betas: tuple[float, float] = BETAS) -> NarrowAdamW:
    names = {weight: name for name, weight in net.named_parameters()}
    groups = [{"params": list(names), "weight_decay": DECAY}]
    return lit(NarrowAdamW(groups, names, dtype, betas, EPS))


def lit(made: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in made.param_groups:
        group["lr"] = RATE
    return made


def train(net: nn.Module, made: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step + 1)
        for weight in net.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        made.step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in net.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_with_moments_as_wide_as_the_weights_it_is_torchs_adamw():
    ours, theirs = Net(torch.float64), Net(torch.float64)
    train(ours, optimizer(ours, torch.float64), 5)
    options = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY}
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=RATE, **options), 5)
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_step_does_not_depend_on_how_moments_rest(dtype):
    """It is made before they are rounded."""
    ours, theirs = Net(torch.float64), Net(torch.float64)
    train(ours, optimizer(ours, dtype), 1)
    train(theirs, optimizer(theirs, torch.float64), 1)
    assert equal(weights(ours), weights(theirs))


def test_moments_rest_in_their_type():
    net = Net()
    made = optimizer(net, torch.bfloat16)
    train(net, made, 1)
    kept = [made.state[weight][name].dtype for weight in net.parameters() for name in ("exp_avg", "exp_avg_sq")]
    assert set(kept) == {torch.bfloat16}


def second_moment(beta2: float, sizes: list[float]) -> tuple[Tensor, Tensor]:
    """4096 second moments after normal gradients, of a size for each step, and the same rounded to nearest; each as
    a multiple of what it should be."""
    net, generator = nn.Linear(4096, 1, bias=False), torch.Generator().manual_seed(0)
    made = optimizer(net, torch.bfloat16, (0.9, beta2))
    nearest, exact = torch.zeros_like(net.weight, dtype=torch.bfloat16), torch.zeros_like(net.weight).double()
    for size in sizes:
        net.weight.grad = size * torch.randn(net.weight.shape, generator=generator)
        made.step()
        square = net.weight.grad.square()
        nearest = (nearest.float() * beta2 + square * (1 - beta2)).to(torch.bfloat16)
        exact = exact * beta2 + square.double() * (1 - beta2)
    return made.state[net.weight]["exp_avg_sq"].double() / exact, nearest.double() / exact


def test_random_rounding_follows_gradients_that_shrink_where_rounding_to_nearest_stops():
    rounded, nearest = second_moment(0.999, [1.0] * 10 + [0.01] * 1000)
    assert rounded.mean().item() == pytest.approx(1, abs=0.01)
    assert nearest.mean().item() > 2


@pytest.mark.parametrize(("beta2", "noise"), [(0.95, 0.008), (0.99, 0.018), (0.999, 0.034)])
def test_the_noise_of_the_second_moment_is_what_the_kind_says(beta2, noise):
    rounded, _ = second_moment(beta2, [1.0] * 1000)
    assert rounded.std().item() == pytest.approx(noise, rel=0.05)
    assert rounded.mean().item() == pytest.approx(1, abs=0.003)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_the_size_of_chunks_changes_nothing(monkeypatch, chunk):
    one, other = Net(), Net()
    train(one, optimizer(one, torch.bfloat16), 3)
    monkeypatch.setitem(narrow.CHUNKS, "cpu", chunk)
    train(other, optimizer(other, torch.bfloat16), 3)
    assert equal(weights(one), weights(other))


def test_weights_of_equal_values_are_rounded_apart():
    net = Net()
    made = optimizer(net, torch.bfloat16)
    for weight in net.parameters():
        weight.grad = torch.full_like(weight, 1.2345)
    made.step()
    moments = [made.state[weight]["exp_avg"].flatten()[:6] for weight in net.parameters()]
    assert not torch.equal(moments[0], moments[1])


def test_a_weight_without_a_gradient_stays():
    net = Net()
    before = weights(net)
    net.norm.grad = torch.ones_like(net.norm)
    optimizer(net, torch.bfloat16).step()
    assert {name for name, weight in weights(net).items() if not torch.equal(weight, before[name])} == {"norm"}


def test_a_restored_run_goes_on_bit_for_bit():
    whole, stopped, resumed = Net(), Net(), Net()
    first, second, third = (optimizer(net, torch.bfloat16) for net in (whole, stopped, resumed))
    train(whole, first, 4)
    train(stopped, second, 2)
    state.restore(resumed, third, {name: value.clone() for name, value in state.collect(stopped, second).items()})
    train(resumed, third, 2, first=2)
    assert equal(state.collect(resumed, third), state.collect(whole, first))


def test_collecting_before_the_first_step_does_not_change_the_run():
    plain, collected = Net(), Net()
    first, second = optimizer(plain, torch.bfloat16), optimizer(collected, torch.bfloat16)
    state.collect(collected, second)
    train(plain, first, 3)
    train(collected, second, 3)
    assert equal(weights(plain), weights(collected))
