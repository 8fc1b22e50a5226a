from __future__ import annotations

import pytest
import torch

from shardforge.families.forms import SAME, Columns, QueryGroups, Rows

WHOLE = torch.arange(24.0).view(6, 4)


def test_a_weight_of_its_own_stays_as_it_is():
    assert SAME.ours([WHOLE])[0] is WHOLE


@pytest.mark.parametrize("leaf", [WHOLE.T, torch.arange(6.0)], ids=["matrix", "bias"])
def test_columns_side_by_side_are_cut_and_turned(leaf):
    parts = Columns(3).ours([leaf])
    whole = leaf.T if leaf.dim() == 2 else leaf
    assert torch.equal(torch.cat(list(parts)), whole) and [len(part) for part in parts] == [2, 2, 2]


def test_rows_below_each_other_are_cut():
    gate, up = Rows(2).ours([WHOLE])
    assert torch.equal(gate, WHOLE[:3]) and torch.equal(up, WHOLE[3:])


@pytest.mark.parametrize("shape", [(16, 5), (16,)], ids=["matrix", "bias"])
def test_groups_of_queries_give_their_heads_in_order(shape):
    # two groups of two query heads, one key and one value head, each of width 2
    whole = torch.arange(16).view(16, *[1] * (len(shape) - 1)).expand(shape)
    q, k, v = (part[..., 0].tolist() if part.dim() > 1 else part.tolist() for part in QueryGroups(2, 2).ours([whole]))
    assert (q, k, v) == ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15])


def test_shapes_are_known_without_numbers():
    q, k, v = QueryGroups(2, 4).ours([torch.empty(32, 8, device="meta")])
    assert (q.shape, k.shape, v.shape) == ((16, 8), (8, 8), (8, 8))
