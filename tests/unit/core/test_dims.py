from __future__ import annotations

import pytest

from shardforge.core.dims import Dim, role

HEADS, WIDTH, VOCAB = Dim("heads", 8), Dim("head_dim", 64), Dim("vocab", 100)


def test_product_keeps_the_outer_name_and_count():
    assert HEADS * WIDTH == Dim("heads", 8, 64)


def test_size_counts_numbers_and_not_pieces():
    assert (HEADS * WIDTH).size == 512


def test_product_of_three_equals_either_grouping():
    third = Dim("part", 2)
    assert (HEADS * WIDTH) * third == HEADS * (WIDTH * third)


@pytest.mark.parametrize(("dim", "text"), [(HEADS, "heads=8"), (HEADS * WIDTH, "heads=8*64")])
def test_dim_prints_its_pieces(dim: Dim, text: str):
    assert str(dim) == text


@pytest.mark.parametrize(
    ("dims", "kind"),
    [
        ((VOCAB, WIDTH), "table"),
        ((WIDTH, VOCAB), "table"),
        ((HEADS, WIDTH), "matrix"),
        ((WIDTH,), "vector"),
        ((VOCAB,), "vector"),
    ],
)
def test_role_follows_from_dims(dims: tuple[Dim, ...], kind: str):
    assert role(dims) == kind
