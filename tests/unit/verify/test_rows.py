from __future__ import annotations

import pytest
import torch

from shardforge.nn.batch import IGNORE, PADDING
from shardforge.parallel.context import zigzag
from shardforge.verify.rows import batch, part
from tests.tiny import tiny

RECIPE = tiny()


def scored(labels: torch.Tensor) -> int:
    return int((labels != IGNORE).sum())


def test_a_batch_is_the_same_every_time():
    assert torch.equal(batch(RECIPE, 3).labels, batch(RECIPE, 3).labels)


def test_steps_have_different_tokens():
    assert not torch.equal(batch(RECIPE, 0).tokens, batch(RECIPE, 1).tokens)


def test_rows_hold_several_documents():
    assert all(len(row.unique()) > 1 for row in batch(RECIPE, 0).documents[:-1])


def test_positions_start_again_with_each_document():
    whole = batch(RECIPE, 0)
    begins = whole.documents[:-1, 1:] > whole.documents[:-1, :-1]
    assert (whole.positions[:-1, 1:][begins] == 0).all()


def test_joined_documents_are_one():
    joined = tiny(data={"sources": [{"path": "nowhere"}], "documents": "joined"})
    assert (batch(joined, 0).documents[0] == 0).all()


def test_a_row_is_padding_alone_and_another_ends_in_it():
    documents = batch(RECIPE, 0).documents
    assert (documents[-1] == PADDING).all()
    assert (documents[1, -4:] == PADDING).all() and documents[1, 0] != PADDING


def test_padding_is_never_scored():
    whole = batch(RECIPE, 0)
    assert (whole.labels[whole.documents == PADDING] == IGNORE).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_no_two_data_ranks_have_equally_many_labels(ranks: int):
    shares = [scored(part(batch(RECIPE, 0), rank, ranks).labels) for rank in range(ranks)]
    assert len(set(shares)) == ranks


@pytest.mark.parametrize("cp", [2, 4])
def test_context_ranks_have_different_numbers_of_labels(cp: int):
    labels = batch(RECIPE, 0).labels
    shares = [scored(labels[:, zigzag(labels.shape[1], cp, rank)]) for rank in range(cp)]
    assert max(shares) > 1.2 * min(shares)
