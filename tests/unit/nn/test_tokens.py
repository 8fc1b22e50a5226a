from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit

B, S = 3, 8


def sequence(index: Tensor | None = None) -> Sequence:
    shape = (B, S if index is None else len(index))
    numbers = torch.zeros(shape, dtype=torch.int64)
    return Sequence(numbers, numbers, torch.arange(B), index=index, length=S)


def values() -> Tensor:
    return torch.arange(B * S * 2).view(B, S, 2)


def rebuilt() -> list[bool]:
    """Four ranks: two halves of a zigzag (chunks 0 and 3, chunks 1 and 2), each split in two."""
    rank = dist.get_rank()
    index = torch.tensor([[0, 1, 6, 7], [2, 3, 4, 5]])[rank // 2]
    split = TokenSplit(rank % 2, 2, dist.group.WORLD)
    mine = split.own(values()[:, index])
    whole = split.whole(mine, sequence(index))
    return [torch.equal(whole, values()), torch.equal(whole[:, split.places(sequence(index))], mine)]


def summed() -> tuple[list[int], list[int]]:
    x = torch.tensor([1, dist.get_rank()])
    return TokenSplit(0, 1, dist.group.WORLD).total(x).tolist(), x.tolist()


def test_a_rank_that_has_everything_has_it_already():
    split, seq = TokenSplit(), sequence()
    assert split.own(values()).equal(values()) and split.whole(values(), seq).equal(values())
    assert split.total(values()).equal(values()) and split.places(seq).tolist() == list(range(S))


def test_whole_sequences_come_back_in_their_order(ranks):
    assert ranks(4).run(rebuilt) == [[True, True]] * 4


def test_a_total_is_over_all_ranks_and_leaves_its_operand(ranks):
    assert ranks(2).run(summed) == [([2, 1], [1, 0]), ([2, 1], [1, 1])]
