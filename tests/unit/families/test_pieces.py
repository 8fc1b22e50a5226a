from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from shardforge.families.pieces import fill, runs

WHOLE = torch.arange(7 * 6 * 5, dtype=torch.float32).view(7, 6, 5)
PLACES = [(Shard(0), Replicate()), (Shard(1), Shard(2)), (Shard(0), Shard(0)), (Replicate(), Shard(2))]


def source(whole: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(read=lambda name: whole)


def filled(places: tuple) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (2, 2))
    target = distribute_tensor(torch.zeros_like(WHOLE), mesh, places)
    fill(source(WHOLE), "x", target)
    return target.full_tensor()


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_the_parts_of_all_ranks_are_the_whole(ranks, places):
    assert all(torch.equal(got, WHOLE) for got in ranks(4).run(filled, places))


def test_numbers_take_the_type_of_the_target():
    target = torch.zeros_like(WHOLE, dtype=torch.float64)
    fill(source(WHOLE.bfloat16()), "x", target)
    assert torch.equal(target, WHOLE.bfloat16().double())


def test_a_number_without_dimensions_is_filled():
    target = torch.tensor(0.0)
    fill(source(torch.tensor(3.0)), "x", target)
    assert target.item() == 3.0


def test_a_run_is_read_piece_by_piece(run_of):
    from shardforge.families.shardforge import RunSource

    run, weights = run_of()
    opened = RunSource(run.checkpoints / "step-00000001")
    opened.read = None  # would bring the whole weight into memory
    for name, weight in weights.items():
        target = torch.zeros_like(weight)
        fill(opened, name, target)
        assert torch.equal(target, weight)


@given(st.sets(st.integers(0, 30)))
def test_spans_are_the_indices_in_order(chosen):
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    told = [(here + n, there + n) for here, there, length in runs(index) for n in range(length)]
    assert told == list(enumerate(index.tolist()))
