from __future__ import annotations

from typing import get_args

import pytest
import torch

from shardforge.model.activations import CURVES, Activation

X = torch.linspace(-6, 6, 101, dtype=torch.float64)
VALUES = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_its_formula(name):
    torch.testing.assert_close(CURVES[name](X), VALUES[name](X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CURVES)
def test_a_slope_is_the_derivative_times_the_gradient(name):
    x, grad = X.clone().requires_grad_(), X.cos()
    (expected,) = torch.autograd.grad((CURVES[name](x) * grad).sum(), x)
    out = torch.full_like(X, float("nan"))
    CURVES[name].slope(grad, X, out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_recipes_may_name_every_curve_and_no_other():
    assert set(get_args(Activation)) == set(CURVES)
