from __future__ import annotations

import pytest
import torch

from shardforge.core.slots import masks
from shardforge.model.masks.causal import Causal
from shardforge.model.masks.window import Window

LENGTHS = [1, 2, 5, 17]
MASKS = [Causal(), *(Window(size=size) for size in (1, 2, 5, 17, 40))]


def dense(mask: object, length: int) -> torch.Tensor:
    place = torch.arange(length)
    return mask.visible(place[:, None], place[None, :])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_number_of_keys_is_the_number_of_visible_pairs(mask, length):
    assert mask.keys(length) == int(dense(mask, length).sum())


@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_window_shows_exactly_its_size_once_there_are_so_many(size):
    assert dense(Window(size=size), 40).sum(1).tolist() == [min(size, place + 1) for place in range(40)]


@pytest.mark.parametrize("size", [17, 18, 1000])
def test_a_window_as_long_as_the_document_is_causal(size):
    assert torch.equal(dense(Window(size=size), 17), dense(Causal(), 17))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_no_mask_shows_the_future_and_each_shows_the_position_itself(mask):
    shown = dense(mask, 17)
    assert torch.equal(shown, shown.tril()) and shown.diagonal().all()


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_the_window_is_the_most_keys_that_any_position_sees(mask):
    most = int(dense(mask, 100).sum(1).max())
    assert most == (100 if mask.window is None else min(mask.window, 100))


def test_equal_masks_name_the_same_table():
    assert {Window(size=3): 1}[Window(size=3)] == 1 and Window(size=3) != Window(size=4)


def test_every_registered_mask_is_tested_here():
    assert {type(mask) for mask in MASKS} == set(masks.kinds().values())
