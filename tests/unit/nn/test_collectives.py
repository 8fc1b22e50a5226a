from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.nn import collectives

SIZES = [2, 4]
SHAPE = (8, 4, 12)


def numbers(rank: int, salt: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * salt + rank), dtype=torch.float64)


def pieces(shape: tuple[int, ...], salt: int = 0) -> list[Tensor]:
    return [numbers(rank, salt, shape) for rank in range(dist.get_world_size())]


def apply(function: Callable[[Tensor], Tensor], xs: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Result and gradient of this rank, and what each rank multiplies its result with before the sum of all."""
    rank = dist.get_rank()
    x = xs[rank].clone().requires_grad_()
    y = function(x)
    weights = pieces(tuple(y.shape), 1)
    (y * weights[rank]).sum().backward()
    return y.detach(), x.grad, weights


def gather(dim: int) -> tuple[bool, bool, bool]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    xs = pieces(SHAPE)
    y, grad, weights = apply(lambda x: collectives.gather(x, group, dim), xs)
    expected = sum(weights).chunk(size, dim)[rank]
    return torch.equal(y, torch.cat(xs, dim)), torch.allclose(grad, expected, rtol=1e-12), y.is_contiguous()


def scatter_sum(dim: int) -> tuple[bool, bool, bool]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    xs = pieces(SHAPE)
    y, grad, weights = apply(lambda x: collectives.scatter_sum(x, group, dim), xs)
    expected = sum(xs).chunk(size, dim)[rank]
    return torch.allclose(y, expected, rtol=1e-12), torch.equal(grad, torch.cat(weights, dim)), y.is_contiguous()


def all_sum() -> tuple[bool, bool, bool]:
    xs = pieces(SHAPE)
    y, grad, weights = apply(lambda x: collectives.all_sum(x, dist.group.WORLD), xs)
    return (
        torch.allclose(y, sum(xs), rtol=1e-12),
        torch.allclose(grad, sum(weights), rtol=1e-12),
        y.is_contiguous(),
    )


def table() -> list[list[int]]:
    """Rows from each rank to each rank; some are none, and the last rank sends nothing at all."""
    size = dist.get_world_size()
    return [[(i * 3 + j) % 4 if i < size - 1 else 0 for j in range(size)] for i in range(size)]


def exchange() -> tuple[bool, bool, bool]:
    rank, rows = dist.get_rank(), table()
    sent, received = rows[rank], [each[rank] for each in rows]
    xs = [numbers(i, 0, (sum(each), 3)) for i, each in enumerate(rows)]
    x = xs[rank].clone().requires_grad_()
    y = collectives.exchange(x, sent, received, dist.group.WORLD)
    expected = torch.cat([x.split(each)[rank] for x, each in zip(xs, rows, strict=True)])
    (3 * y).sum().backward()
    return torch.equal(y, expected), torch.equal(x.grad, torch.full_like(x, 3.0)), y.is_contiguous()


def returned() -> bool:
    """Rows that are sent back lie where they were."""
    rank, rows = dist.get_rank(), table()
    sent, received = rows[rank], [each[rank] for each in rows]
    x = numbers(rank, 0, (sum(sent), 3))
    there = collectives.exchange(x, sent, received, dist.group.WORLD)
    return torch.equal(collectives.exchange(there, received, sent, dist.group.WORLD), x)


def transposed() -> list[bool]:
    """Each collective of a transposed view against that of its copy."""
    group, x = dist.group.WORLD, numbers(dist.get_rank(), 0, SHAPE).transpose(0, 2)
    tried = [lambda x: collectives.gather(x, group, 1), lambda x: collectives.scatter_sum(x, group, 1)]
    tried.append(lambda x: collectives.all_sum(x, group))
    return [torch.equal(each(x), each(x.contiguous())) for each in tried]


def sum_leaves_its_operand() -> bool:
    x = numbers(dist.get_rank(), 0, SHAPE)
    collectives.all_sum(x, dist.group.WORLD)
    return torch.equal(x, numbers(dist.get_rank(), 0, SHAPE))


def round_trip() -> bool:
    """scatter_sum of what gather made is `size` times the own piece."""
    x = numbers(dist.get_rank(), 0, SHAPE)
    back = collectives.scatter_sum(collectives.gather(x, dist.group.WORLD, 1), dist.group.WORLD, 1)
    return torch.allclose(back, x * dist.get_world_size(), rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("function", [gather, scatter_sum])
def test_pieces_move_forward_and_gradients_move_back(ranks, size, dim, function):
    assert ranks(size).run(function, dim) == [(True, True, True)] * size


@pytest.mark.parametrize("size", SIZES)
def test_a_sum_is_the_sum_and_its_gradient_the_sum_of_gradients(ranks, size):
    assert ranks(size).run(all_sum) == [(True, True, True)] * size


def test_transposed_tensors_are_sent_in_their_own_order(ranks):
    assert ranks(2).run(transposed) == [[True] * 3] * 2


def test_a_sum_does_not_touch_its_operand(ranks):
    assert ranks(2).run(sum_leaves_its_operand) == [True] * 2


def test_scattering_undoes_gathering(ranks):
    assert ranks(4).run(round_trip) == [True] * 4


@pytest.mark.parametrize("size", SIZES)
def test_rows_and_their_gradients_are_exchanged_in_uneven_pieces(ranks, size):
    assert ranks(size).run(exchange) == [(True, True, True)] * size


@pytest.mark.parametrize("size", SIZES)
def test_an_exchange_is_undone_by_the_opposite_one(ranks, size):
    assert ranks(size).run(returned) == [True] * size
