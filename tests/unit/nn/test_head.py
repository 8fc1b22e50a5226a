from __future__ import annotations

import torch
import torch.distributed as dist

from shardforge.nn.head import VocabSplit


def over_two() -> tuple[list[float], list[float]]:
    x = torch.tensor([1.0, -5.0]) * (dist.get_rank() + 1)
    split = VocabSplit(0, dist.group.WORLD)
    return split.total(x.clone()).tolist(), split.top(x.clone()).tolist()


def test_a_whole_vocabulary_is_its_own_sum_and_maximum():
    x = torch.tensor([1.0, -5.0])
    assert VocabSplit().total(x) is x and VocabSplit().top(x) is x


def test_a_split_vocabulary_is_summed_and_maximised_over_its_ranks(ranks):
    assert ranks(2).run(over_two) == [([3.0, -15.0], [2.0, -5.0])] * 2
