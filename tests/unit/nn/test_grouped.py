from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from shardforge.nn import grouped
from shardforge.nn.grouped import grouped_linear, grouped_linears, listed, segment_sum

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
    loop = results(*operands(counts, (16, 24), dtype), counts)
    monkeypatch.setattr(grouped, "_has_kernel", lambda x, weight: True)
    kernel = results(*operands(counts, (16, 24), dtype), counts)
    for left, right in zip(kernel, loop, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("widths", "dtype", "device", "expected"),
    [
        ((16, 24), torch.bfloat16, "cuda", True),
        ((5, 24), torch.bfloat16, "cuda", False),
        ((16, 24), torch.float32, "cuda", False),
        ((16, 24), torch.bfloat16, "cpu", False),
    ],
)
def test_the_kernel_runs_off_the_cpu_where_rows_fill_whole_vectors(widths, dtype, device, expected):
    with FakeTensorMode():
        x, weight = torch.empty(5, widths[0], dtype=dtype, device=device), torch.empty(2, *widths, device=device)
        assert grouped._has_kernel(x, weight) is expected


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_each_row_gets_the_bias_of_its_group(counts):
    x, weight = operands(counts, (5, 7), torch.float64)
    bias = torch.randn(len(counts), 7, dtype=torch.float64, requires_grad=True)
    y = grouped_linear(x, weight, torch.tensor(counts), bias)
    rows = bias.detach().repeat_interleave(torch.tensor(counts), 0)
    torch.testing.assert_close(y, grouped_linear(x, weight, torch.tensor(counts)) + rows)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(bias.grad, torch.stack([rows.sum(0) for rows in grad.split(counts)]))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("biased", [False, True])
def test_products_of_the_same_rows_are_those_of_each_weight(counts, biased):
    x, first = operands(counts, (5, 7), torch.float64)
    weights = [first, torch.randn_like(first).requires_grad_(), torch.randn_like(first).requires_grad_()]
    biases = [torch.randn(len(counts), 7, dtype=torch.float64) if biased else None for _ in weights]
    grads = [torch.randn(len(x), 7, dtype=torch.float64) for _ in weights]
    number = torch.tensor(counts)
    single = [grouped_linear(x, weight, number, bias) for weight, bias in zip(weights, biases, strict=True)]
    joint = grouped_linears(x, weights, number, biases)
    for left, right in zip(joint, single, strict=True):
        assert torch.equal(left, right)
    wanted = torch.autograd.grad(single, [x, *weights], grads)
    for left, right in zip(torch.autograd.grad(joint, [x, *weights], grads), wanted, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("wanted", ["x", "second"])
def test_products_of_the_same_rows_give_the_gradient_that_is_asked_for_alone(wanted):
    x, first = operands([2, 0, 3], (5, 7), torch.float64)
    second = torch.randn_like(first)
    leaves = {"x": x.detach(), "second": second}
    leaves[wanted].requires_grad_()
    pair = grouped_linears(leaves["x"], [first.detach(), leaves["second"]], torch.tensor([2, 0, 3]), [None, None])
    sum(y.sum() for y in pair).backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_operations_keep_the_rules_of_torch_for_compilers():
    counts = torch.tensor([2, 0, 3])
    x, weight = operands([2, 0, 3], (4, 6), torch.float64)
    bias = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for operation, args in {
        grouped.grouped_mm: (x, weight, counts),
        grouped.grouped_mm_onto: (x.detach(), weight.detach(), counts, torch.randn(5, 6, dtype=torch.float64)),
        grouped.grouped_outer: (x.detach(), torch.randn(5, 6, dtype=torch.float64), counts),
        grouped.grouped_add: (torch.randn(5, 6, dtype=torch.float64, requires_grad=True), bias, counts),
        grouped.grouped_sum: (torch.randn(5, 6, dtype=torch.float64), counts),
    }.items():
        torch.library.opcheck(operation, args)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_in_one_kernel_are_those_of_each_group(counts, dtype):
    y = torch.randn(sum(counts), 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.stack([rows.sum(0) for rows in y.split(counts)])
    torch.testing.assert_close(segment_sum(y, torch.tensor(counts)), expected)


def test_sums_in_one_kernel_keep_rows_that_are_small_beside_the_sum():
    """In bfloat16 256 + 1 is 256."""
    counts = [1000, 0, 24]
    y = torch.ones(1024, 3, dtype=torch.bfloat16)
    assert segment_sum(y, torch.tensor(counts))[:, 0].tolist() == counts


def test_off_the_cpu_sums_do_not_wait_for_the_counts(monkeypatch):
    """torch's own meta device has no numbers to wait for."""
    y, counts = torch.empty(5, 7, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    monkeypatch.setattr(grouped, "listed", lambda *args: pytest.fail("counts were read"))
    assert grouped.grouped_sum._init_fn(y, counts).shape == (3, 7)


def test_gradients_are_contiguous():
    assert all(each.is_contiguous() for each in results(*operands([2, 3], (16, 24), torch.float32), [2, 3]))


def test_counts_are_listed_as_they_are():
    assert listed(torch.tensor([3, 0, 4]), 7) == [3, 0, 4]


def test_a_dry_run_counts_evenly():
    with FakeTensorMode():
        assert listed(torch.zeros(3, dtype=torch.int64), 7) == [3, 2, 2]
        assert listed(torch.zeros(2, 3, dtype=torch.int64), 7) == [[3, 2, 2], [3, 2, 2]]
