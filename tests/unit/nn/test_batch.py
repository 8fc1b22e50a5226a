from __future__ import annotations

import pytest
import torch

from tests.tiny import SEQUENCES, batch


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 8), (3, [3, 3, 2]), (8, [8]), (20, [8])])
def test_pieces_have_the_size_asked_for_but_the_last(size, lengths):
    assert [len(piece) for piece in batch().split(size)] == lengths


@pytest.mark.parametrize("field", ["tokens", "labels", "positions", "documents", "rows"])
def test_pieces_joined_are_the_batch(field):
    whole = batch()
    assert torch.equal(torch.cat([getattr(piece, field) for piece in whole.split(3)]), getattr(whole, field))


def test_the_length_of_a_batch_is_its_number_of_sequences():
    assert len(batch()) == SEQUENCES
