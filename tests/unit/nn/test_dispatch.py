from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardforge.nn import dispatch, fused
from shardforge.nn.dispatch import NOWHERE, Local, by_group, count, gathered_sum, spread, weighted_sum

T, K, E, H = 9, 2, 4, 3


def scaled(x: Tensor, counts: Tensor) -> Tensor:
    """Experts that multiply: expert i by i + 1."""
    factor = torch.arange(1, len(counts) + 1, dtype=x.dtype).repeat_interleave(counts)
    return x * factor[:, None]


def assigned(dropped: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    expert = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)])
    weight = torch.rand(T, K, generator=generator, dtype=torch.float64)
    if dropped:
        expert[::3, 1] = NOWHERE
        expert[4] = NOWHERE
    return x, expert, weight


def brute_force(x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
    """scaled, one token and one expert at a time."""
    factor = (expert + 1).double() * (expert != NOWHERE)
    return x * (factor * weight).sum(1, keepdim=True)


@given(st.lists(st.integers(-1, 3), max_size=40))
def test_assignments_are_sorted_by_group_then_by_token_and_those_to_nowhere_come_last(groups):
    order, counts = by_group(torch.tensor(groups, dtype=torch.int64)[:, None], E)
    found = [(groups[i], i) for i in order.tolist()]
    assert found == sorted(found, key=lambda pair: (pair[0] % (E + 1), pair[1]))
    assert counts.tolist() == [groups.count(group) for group in range(E)]


def test_counts_of_rows_are_counted_apart():
    assert count(torch.tensor([[0, 0, 2], [NOWHERE, 3, 3]]), E).tolist() == [[2, 0, 1, 0], [0, 0, 0, 2]]


def test_every_token_gets_the_weighted_sum_of_its_experts():
    x, expert, weight = assigned()
    torch.testing.assert_close(Local(E, True)(x, expert, weight, scaled), brute_force(x, expert, weight))


def test_a_dropped_assignment_adds_nothing():
    x, expert, weight = assigned(dropped=True)
    y = Local(E, False)(x, expert, weight, scaled)
    torch.testing.assert_close(y, brute_force(x, expert, weight))
    assert not y[4].any()


def test_a_dropped_assignment_is_not_computed():
    x, expert, weight = assigned(dropped=True)
    rows = []
    Local(E, False)(x, expert, weight, lambda x, counts: rows.append(len(x)) or x)
    assert rows == [int((expert != NOWHERE).sum())]


def test_gradients_are_those_of_the_formula():
    x, expert, weight = (each.requires_grad_() if each.is_floating_point() else each for each in assigned(dropped=True))
    assert torch.autograd.gradcheck(lambda x, w: Local(E, False)(x, expert, w, scaled), (x, weight))


def test_spreading_and_summing_are_each_others_backward():
    x = assigned()[0].requires_grad_()
    order = torch.tensor([0, 5, 4, 17])
    y = spread(x, order, K)
    assert torch.equal(y, x[order // K])
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, gathered_sum(grad, order, K, T))


@pytest.mark.parametrize("dropped", [False, True])
def test_the_loop_of_the_cpu_and_the_formula_agree(monkeypatch, dropped):
    found = []
    for in_cache in (True, False):
        monkeypatch.setattr(dispatch, "_in_cache", lambda y, answer=in_cache: answer)
        x, expert, weight = assigned(dropped)
        y = Local(E, not dropped)(x.requires_grad_(), expert, weight.requires_grad_(), scaled)
        (y * y.detach().cos()).sum().backward()
        found.append([y.detach(), x.grad, weight.grad])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_rows_beyond_one_piece_of_the_cache_are_weighted_too(monkeypatch):
    monkeypatch.setattr(fused, "CACHED", 4 * H)
    x, expert, weight = (each.requires_grad_() if each.is_floating_point() else each for each in assigned(dropped=True))
    assert torch.autograd.gradcheck(lambda x, w: Local(E, False)(x, expert, w, scaled), (x, weight))


def test_no_tokens_are_an_answer_too():
    x, expert, weight = (each[:0] for each in assigned())
    assert Local(E, True)(x, expert, weight, scaled).shape == (0, H)


def test_narrow_rows_are_summed_with_wide_weights_in_their_own_type():
    y = torch.ones(4, H, dtype=torch.bfloat16)
    assert weighted_sum(y, torch.arange(4), torch.full((2, 2), 0.5)).dtype == torch.bfloat16
