from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.model.activations import CURVES
from shardforge.nn import fused

SHAPES = {"rows": (5, 6), "deep": (2, 3, 6), "one-row": (1, 6), "one-vector": (6,), "no-rows": (0, 6)}


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


def same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Result and gradients of both, to the last digits of float64."""
    found = []
    for function in (ours, plain):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = function(*leaves)
        found.append([y, *torch.autograd.grad((y * draw(*y.shape)).sum(), leaves)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True, params=[1 << 17, 13, 1], ids=["whole", "two-rows", "row-by-row"])
def cached(request, monkeypatch) -> None:
    monkeypatch.setattr(fused, "CACHED", request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_is_that_of_torch(shape, eps):
    same(lambda x, w: fused.rms_norm(x, w, eps), lambda x, w: F.rms_norm(x, (6,), w, eps), draw(*shape), draw(6) + 2)


def test_rms_norm_of_a_transposed_tensor_is_that_of_its_copy():
    x, weight = draw(2, 3, 6).transpose(0, 1), draw(6)
    same(lambda x, w: fused.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, (6,), w, 1e-6), x, weight)


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    fused.rms_norm(x, torch.ones(6, dtype=torch.float64), 1e-6).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("curve", CURVES)
def test_a_gate_is_the_curve_times_the_other(curve, shape):
    same(
        lambda gate, up: fused.gated(gate, up, CURVES[curve]),
        lambda gate, up: CURVES[curve](gate) * up,
        draw(*shape),
        draw(*shape) + 1,
    )


def test_a_gate_of_transposed_tensors_is_that_of_their_copies():
    gate, up = draw(2, 3, 6).transpose(0, 1), draw(2, 3, 6).transpose(0, 1) + 1
    same(lambda g, u: fused.gated(g, u, CURVES["silu"]), lambda g, u: F.silu(g) * u, gate, up)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("shared", [True, False])
def test_turning_pairs_is_what_autograd_makes_of_it(shared, layout):
    angle = draw(2, 5, 1, 3)
    cos, sin = 1.5 * angle.cos(), 1.5 * angle.sin()
    first = [0, 1, 2] if layout == "half" else [0, 2, 4]
    second = [3, 4, 5] if layout == "half" else [1, 3, 5]

    def plain(x: Tensor) -> Tensor:
        a, b = x[..., first], x[..., second]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)[..., torch.tensor([*first, *second]).argsort()]

    x = draw(2, 5, 4, 6) if not shared else draw(2, 5, 4, 8)[..., :6]
    same(lambda x: fused.rotate(x, cos, sin, layout), plain, x)


@pytest.mark.parametrize("function", ["norm", "gate"])
def test_half_precision_takes_the_way_of_torch(function):
    x, weight = draw(5, 6, dtype=torch.bfloat16), draw(6, dtype=torch.bfloat16)
    if function == "norm":
        assert torch.equal(fused.rms_norm(x, weight, 1e-6), F.rms_norm(x, (6,), weight, 1e-6))
    else:
        assert torch.equal(fused.gated(x, x, CURVES["silu"]), F.silu(x) * x)
