from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardforge.nn import collectives, overlap
from shardforge.nn.overlap import Arriving, arriving_product, product_scatter_sum

H, OUT = 3, 5
SHAPES = [(1, 1), (1, 8), (2, 5), (3, 2)]
"""Sequences, and positions of each rank: fewer than there are pieces, and numbers that they do not divide."""


def numbers(salt: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(salt), dtype=torch.float64)


def leaves(b: int, part: int, width: int) -> list[Tensor]:
    """x of this rank with `part` positions, two weights and a bias that differ between ranks."""
    rank = dist.get_rank()
    made = [numbers(rank, b, part, width), *(numbers(10 * n + rank, OUT, width) for n in (1, 2))]
    return [leaf.requires_grad_() for leaf in [*made, numbers(30 + rank, OUT)]]


def backward(ys: list[Tensor], xs: list[Tensor]) -> list[Tensor]:
    """Results, then the gradients of a sum over all ranks in which no two numbers weigh the same."""
    rank = dist.get_rank()
    sum((y * numbers(50 + 10 * n + rank, *y.shape)).sum() for n, y in enumerate(ys)).backward()
    return [*(y.detach() for y in ys), *(x.grad for x in xs)]


def near(got: list[Tensor], expected: list[Tensor]) -> list[bool]:
    return [torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(got, expected, strict=True)]


def arriving(b: int, part: int) -> tuple[list[bool], list[bool]]:
    group = dist.group.WORLD
    x, w, other, bias = leaves(b, part, H)
    source = Arriving(group, x)
    ys = [arriving_product(source, w, bias), arriving_product(source, other)]
    got = backward(ys, [x, w, other, bias])
    x, w, other, bias = leaves(b, part, H)
    whole = collectives.gather(x, group, 1)
    expected = backward([F.linear(whole, w, bias), F.linear(whole, other)], [x, w, other, bias])
    return near(got, expected), [y.is_contiguous() for y in ys]


def leaving(b: int, part: int) -> tuple[list[bool], bool]:
    group = dist.group.WORLD
    s = part * group.size()
    x, w, _, bias = leaves(b, s, H)
    y = product_scatter_sum(group, x, w, bias)
    got = backward([y], [x, w, bias])
    x, w, _, bias = leaves(b, s, H)
    expected = backward([collectives.scatter_sum(F.linear(x, w, bias), group, 1)], [x, w, bias])
    return near(got, expected), y.is_contiguous()


def transposed() -> list[bool]:
    """Both products of views whose memory has another order."""
    group = dist.group.WORLD
    x, w = numbers(dist.get_rank(), 8, 2, H).transpose(0, 1), numbers(7, H, OUT).T
    return near(
        [arriving_product(Arriving(group, x), w), product_scatter_sum(group, x, w)],
        [F.linear(collectives.gather(x, group, 1), w), collectives.scatter_sum(F.linear(x, w), group, 1)],
    )


def order(forward: bool) -> list[str]:
    """What happens in which order on the way in, or in the backward pass of it."""
    seen: list[str] = []

    def told(name: str, function):
        def call(*args):
            seen.append(name)
            return function(*args)

        return call

    def landed(flights):
        for cut, piece, work in flights:
            work.wait()
            seen.append("wait")
            yield cut, piece

    x, w, _, _ = leaves(1, 8, H)
    watched = {
        "start_gather": told("start", overlap.start_gather),
        "start_scatter_sum": told("start", overlap.start_scatter_sum),
        "_landed": landed,
        "_weight_grads": told("weight", overlap._weight_grads),
    }
    with patch.multiple(overlap, **watched), patch.object(F, "linear", told("matmul", F.linear)):
        y = arriving_product(Arriving(dist.group.WORLD, x), w)
        if not forward:
            seen.clear()
            y.sum().backward()
    return seen


def frozen() -> list[bool]:
    """A weight without gradient gets none, and x still has its own."""
    x, w, _, _ = leaves(1, 8, H)
    w.requires_grad_(False)
    arriving_product(Arriving(dist.group.WORLD, x), w).sum().backward()
    return [w.grad is None, x.grad is not None]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("b", "part"), SHAPES)
def test_products_of_an_arriving_sequence_are_those_of_the_gathered_one(ranks, size, b, part):
    assert ranks(size).run(arriving, b, part) == [([True] * 6, [True] * 2)] * size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("b", "part"), SHAPES)
def test_a_product_that_leaves_in_pieces_is_the_scattered_sum(ranks, size, b, part):
    assert ranks(size).run(leaving, b, part) == [([True] * 4, True)] * size


def test_transposed_tensors_are_sent_in_their_own_order(ranks):
    assert ranks(2).run(transposed) == [[True] * 2] * 2


def test_all_pieces_are_on_their_way_before_the_first_matmul(ranks):
    expected = ["start"] * overlap.PIECES + ["wait", "matmul"] * overlap.PIECES
    assert ranks(2).run(order, True) == [expected] * 2


def test_the_gradient_of_the_weight_is_computed_while_that_of_the_input_travels(ranks):
    expected = ["start"] * overlap.PIECES + ["weight"] + ["wait"] * overlap.PIECES
    assert ranks(2).run(order, False) == [expected] * 2


def test_a_frozen_weight_gets_no_gradient(ranks):
    assert ranks(2).run(frozen) == [[True, True]] * 2
