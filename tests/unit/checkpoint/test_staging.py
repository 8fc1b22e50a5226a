from __future__ import annotations

import pytest
import torch

from shardforge.checkpoint.staging import Staging, check, whole_bytes
from shardforge.core.errors import CheckpointError
from shardforge.core.layout import Layout
from tests.unit.checkpoint import sharded


def test_a_copy_does_not_follow_the_original():
    live = torch.ones(3)
    copied = Staging().copy({"x": live})
    live.zero_()
    assert copied["x"].tolist() == [1, 1, 1]


def test_memory_is_used_again_by_the_next_copy():
    staging = Staging()
    first = staging.copy({"x": torch.ones(3)})["x"].data_ptr()
    assert staging.copy({"x": torch.zeros(3)})["x"].data_ptr() == first


@pytest.mark.parametrize("changed", [torch.zeros(4), torch.zeros(3).double()], ids=["shape", "type"])
def test_a_tensor_that_changed_gets_memory_of_its_own(changed):
    staging = Staging()
    staging.copy({"x": torch.ones(3)})
    copied = staging.copy({"x": changed})["x"]
    assert (copied.shape, copied.dtype) == (changed.shape, changed.dtype)


@pytest.mark.parametrize("value", [torch.zeros(1, dtype=torch.complex64), {"a": 1}, 3], ids=["complex", "dict", "int"])
def test_what_a_checkpoint_cannot_hold_is_named(value):
    with pytest.raises(CheckpointError, match=r"optim\.x"):
        check({"optim.x": value}, {})


def test_extra_must_be_plain_json():
    with pytest.raises(CheckpointError, match="not plain JSON"):
        check({}, {"a": torch.zeros(1)})


def test_the_size_of_split_tensors_is_that_of_the_whole(ranks):
    assert ranks(2).run(size_of_table) == [8 * 6 * 4] * 2


def size_of_table() -> int:
    net, _ = sharded.build(Layout(tp=2), 1)
    return whole_bytes({"table": net.table})
