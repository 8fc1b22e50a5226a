from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardforge.nn.batch import IGNORE, PADDING, Batch
from tests.tiny import SEQUENCES, batch

NO, P = IGNORE, PADDING


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 8), (3, [3, 3, 2]), (8, [8]), (20, [8])])
def test_pieces_have_the_size_asked_for_but_the_last(size, lengths):
    assert [len(piece) for piece in batch().split(size)] == lengths


@pytest.mark.parametrize("field", ["tokens", "labels", "positions", "documents", "rows"])
def test_pieces_joined_are_the_batch(field):
    whole = batch()
    assert torch.equal(torch.cat([getattr(piece, field) for piece in whole.split(3)]), getattr(whole, field))


def test_the_length_of_a_batch_is_its_number_of_sequences():
    assert len(batch()) == SEQUENCES


def row(documents: list[int]) -> Batch:
    """One row of six places; token 10 + i at place i, and label 11 + i."""
    place = torch.arange(6)[None]
    starts = torch.tensor([[documents.index(document) for document in documents]])
    return Batch(10 + place, 11 + place, place - starts, torch.tensor([documents]), torch.zeros(1, dtype=torch.int64))


AHEAD = {
    "one document": (
        [0, 0, 0, 0, 0, 0],
        [[11, 12, 13, 14, 15, 15], [12, 13, 14, 15, 14, 15]],
        [[12, 13, 14, 15, 16, NO], [13, 14, 15, 16, NO, NO]],
        [[0, 0, 0, 0, 0, P], [0, 0, 0, 0, P, P]],
    ),
    "two documents and padding": (
        [0, 0, 0, 1, 1, P],
        [[11, 12, 12, 14, 14, 15], [12, 11, 12, 13, 14, 15]],
        [[12, 13, NO, 15, NO, NO], [13, NO, NO, NO, NO, NO]],
        [[0, 0, P, 1, P, P], [0, P, P, P, P, P]],
    ),
}
"""Documents of a row, and by depth: tokens, labels and documents of the places, worked out by hand."""


@pytest.mark.parametrize(("documents", "tokens", "labels", "left"), AHEAD.values(), ids=AHEAD)
def test_two_tokens_ahead_of_six_are_those_of_the_hand_made_table(documents, tokens, labels, left):
    found = row(documents).look_ahead(2).ahead
    assert [each.tokens[0].tolist() for each in found] == tokens
    assert [each.labels[0].tolist() for each in found] == labels
    assert [each.documents[0].tolist() for each in found] == left


def test_a_token_ahead_keeps_the_position_that_it_has_in_its_document():
    assert row([0, 0, 0, 1, 1, P]).look_ahead(1).ahead[0].positions[0].tolist() == [1, 2, 2, 1, 1, 0]


def test_a_label_that_is_not_scored_is_not_scored_from_further_back():
    given = row([0] * 6)
    given.labels[0, 3] = IGNORE
    assert given.look_ahead(1).ahead[0].labels[0].tolist() == [12, 13, IGNORE, 15, 16, IGNORE]


def test_looking_no_token_ahead_is_the_batch():
    assert batch().look_ahead(0).ahead == ()


@pytest.mark.parametrize("depth", [5, 6, 9])
def test_looking_further_than_a_row_finds_padding(depth):
    found = row([0] * 6).look_ahead(depth).ahead
    assert (
        len(found) == depth
        and [int((each.labels != IGNORE).sum()) for each in found] == [5, 4, 3, 2, 1, 0, 0, 0, 0][:depth]
    )


def columns(whole: Batch) -> list[Tensor]:
    return [x for each in (whole, *whole.ahead) for x in (each.tokens, each.labels, each.positions, each.documents)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda whole: list(whole.split(3))[1], lambda x: x[3:6]),
        (lambda whole: whole.at(torch.tensor([4, 0, 9])), lambda x: x[:, [4, 0, 9]]),
        (lambda whole: whole.to(torch.device("meta")).to(torch.device("meta")), lambda x: x.to("meta")),
    ],
    ids=["split", "at", "to"],
)
def test_a_part_of_a_batch_has_the_same_part_of_what_is_ahead(change, expected):
    whole = batch().look_ahead(2)
    for got, want in zip(columns(change(whole)), map(expected, columns(whole)), strict=True):
        assert got.device == want.device and got.shape == want.shape and (got.is_meta or torch.equal(got, want))
