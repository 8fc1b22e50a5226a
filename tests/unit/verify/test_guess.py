from __future__ import annotations

import pytest
import torch

from shardforge.core.layout import Layout
from shardforge.verify.guess import guesses, partitions
from tests.tiny import tiny

RECIPE = tiny()


@pytest.mark.parametrize(
    ("layout", "micro", "names"),
    [
        ("dp2", 1, ["data rank"]),
        ("dp2", 2, ["data rank", "micro-batch", "micro-batch of a data rank"]),
        ("dp2-cp2", 1, ["data rank", "cp rank", "data and cp rank"]),
    ],
)
def test_a_batch_is_cut_in_every_way_in_which_it_is_shared(layout: str, micro: int, names: list[str]):
    assert [name for name, _ in partitions(RECIPE, Layout.parse(layout), micro)] == names


@pytest.mark.parametrize("layout", ["dp2", "rep2-dp2", "cp2", "dp2-cp4"])
def test_the_shares_of_a_cut_are_the_batch(layout: str):
    for _, shares in partitions(RECIPE, Layout.parse(layout), 2):
        assert (torch.stack(shares).sum(0) == 1).all()


def test_the_micro_batches_of_a_step_hold_rows_of_every_data_rank():
    cuts = dict(partitions(RECIPE, Layout(dp_shard=2), 2))
    assert cuts["micro-batch"][0][:, 0].tolist() == [True, True, False, False, True, True, False, False]


def test_a_guess_has_a_loss_and_every_gradient(ranks):
    found = ranks(1).run(guesses, RECIPE, Layout(dp_shard=2), 1)[0]
    told = "each data rank divides by the number of its own scored labels; divide by that of the whole batch"
    alone = "gradients are not summed over data ranks: rank 0 has that of its own share"
    assert list(found) == [told, alone]
    assert {what for _, what, _ in found[told]} == {"loss", "gradient"}
    assert found[told]["step 1", "loss", ""] != found[alone]["step 1", "loss", ""]
