from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from shardforge.nn import grouped
from shardforge.nn.grouped import grouped_linear, listed

COUNTS = {"uneven": [5, 0, 12, 3], "first-only": [7, 0, 0, 0], "last-only": [0, 0, 0, 7], "no-rows": [0, 0, 0, 0]}
WIDTHS = {"whole-vectors": (16, 24), "odd": (5, 7)}


def operands(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), widths[0], generator=generator)
    weight = torch.randn(len(counts), *widths, generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def results(x: Tensor, weight: Tensor, counts: list[int]) -> list[Tensor]:
    y = grouped_linear(x, weight, torch.tensor(counts))
    y.sum().backward()  # an expanded gradient, which the kernel itself refuses
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_group_is_multiplied_with_its_own_weight(counts, widths, dtype):
    x, weight = operands(counts, widths, dtype)
    y, dx, dweight = results(x, weight, counts)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    rows = zip(x.detach().split(counts), weight.detach(), strict=True)
    torch.testing.assert_close(y, torch.cat([part @ each for part, each in rows]), **tolerance)
    ones = [torch.ones(n, widths[1], dtype=dtype) for n in counts]
    back = [one @ each.T for one, each in zip(ones, weight.detach(), strict=True)]
    torch.testing.assert_close(dx, torch.cat(back), **tolerance)
    sums = [part.T @ one for part, one in zip(x.detach().split(counts), ones, strict=True)]
    torch.testing.assert_close(dweight, torch.stack(sums), **tolerance)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_group_without_rows_gets_a_gradient_of_zeros(counts, dtype):
    *_, dweight = results(*operands(counts, (16, 24), dtype), counts)
    assert [bool(each.any()) for each in dweight] == [n > 0 for n in counts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_and_the_loop_agree(monkeypatch, dtype):
    counts = COUNTS["uneven"]
    kernel = results(*operands(counts, (16, 24), dtype), counts)
    monkeypatch.setattr(grouped, "_has_kernel", lambda x, weight: False)
    loop = results(*operands(counts, (16, 24), dtype), counts)
    for left, right in zip(kernel, loop, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


@pytest.mark.parametrize(("widths", "dtype", "expected"), [((16, 24), torch.float32, 1), ((5, 7), torch.float32, 0)])
def test_the_kernel_runs_where_rows_fill_whole_vectors(monkeypatch, widths, dtype, expected):
    calls = []
    kernel = torch.nn.functional.grouped_mm
    monkeypatch.setattr(grouped.F, "grouped_mm", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    results(*operands([2, 3], widths, dtype), [2, 3])
    assert len(calls) == expected


def test_gradients_are_contiguous():
    assert all(each.is_contiguous() for each in results(*operands([2, 3], (16, 24), torch.float32), [2, 3]))


def test_counts_are_listed_as_they_are():
    assert listed(torch.tensor([3, 0, 4]), 7) == [3, 0, 4]


def test_a_dry_run_counts_evenly():
    with FakeTensorMode():
        assert listed(torch.zeros(3, dtype=torch.int64), 7) == [3, 2, 2]
        assert listed(torch.zeros(2, 3, dtype=torch.int64), 7) == [[3, 2, 2], [3, 2, 2]]
