from __future__ import annotations

import pytest
import torch

from shardforge.model.masks.causal import Causal
from shardforge.model.masks.window import Window
from shardforge.nn.batch import PADDING
from shardforge.nn.sequence import Places, Sequence, visible

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, PADDING, PADDING]])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 0, 1]])
SEQ = Sequence(POSITIONS, DOCUMENTS, torch.arange(2))


def naive(reach: int) -> list:
    """[b][s][t]: same document, not later, and less than `reach` back."""
    doc = DOCUMENTS.tolist()
    return [[[row[t] == row[s] and 0 <= s - t < reach for t in range(8)] for s in range(8)] for row in doc]


@pytest.mark.parametrize(("mask", "reach"), [(Causal(), 8), (Window(size=2), 2), (Window(size=1), 1)], ids=str)
def test_a_position_sees_its_own_document_only(mask, reach):
    assert visible(mask, SEQ)[:, 0].tolist() == naive(reach)


def test_every_position_sees_itself_padding_too():
    assert visible(Window(size=1), SEQ)[:, 0].diagonal(dim1=1, dim2=2).all()


def test_queries_see_keys_from_where_those_stand():
    queries = Sequence(POSITIONS[:, 4:6], DOCUMENTS[:, 4:6], torch.arange(2))
    queries.keys = Places(POSITIONS, DOCUMENTS).at(slice(2, 6))
    for mask in (Causal(), Window(size=2)):
        assert torch.equal(visible(mask, queries), visible(mask, SEQ)[:, :, 4:6, 2:6])


def test_a_table_is_made_once():
    seq, made = Sequence(POSITIONS, DOCUMENTS, torch.arange(2)), []
    for _ in range(2):
        seq.prepare("table", lambda: made.append(1) or torch.zeros(1))
    assert made == [1]


def test_equal_masks_share_a_table():
    seq = Sequence(POSITIONS, DOCUMENTS, torch.arange(2))
    for mask in (Window(size=3), Window(size=3), Causal()):
        seq.prepare(mask, lambda mask=mask: visible(mask, seq))
    assert len(seq.tables) == 2
