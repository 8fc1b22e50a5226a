from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch

from shardforge.convert.format import Item
from shardforge.convert.pieces import Pieces, label, not_finite
from shardforge.core.errors import CheckpointError
from shardforge.families.forms import EXPERTS, SAME, TURNED, Chain, Rows
from shardforge.families.source import BARE, Info


class Memory:
    """A source in memory that counts what is read of it."""

    path, model, beside = Path("memory"), {}, BARE
    moments, counts = ("exp_avg",), ("step",)

    def __init__(self, **tensors: torch.Tensor):
        self.tensors, self.read_of = tensors, Counter()
        self.names = {name: Info(tuple(each.shape), str(each.dtype)[6:]) for name, each in tensors.items()}

    def read(self, name):
        self.read_of[name] += 1
        return self.tensors[name]

    def read_moment(self, kind, name):
        return self.tensors[name] * 2


def sha(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def item(key, ours, shape, form=SAME, part=0, dtype="float32", kind=""):
    return Item(key, dtype, tuple(shape), tuple(ours), part, form, kind)


def passed(source, *items):
    """The tensors that the items become, and what was found out."""
    with Pieces(source) as pieces:
        made = [pieces.part(each).read().clone() for each in items]
        return made, pieces.found()


@pytest.fixture
def a():
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_what_is_unchanged_has_one_hash_for_both_sides(a):
    (made,), found = passed(Memory(a=a), item("x", "a", (4, 6)))
    assert torch.equal(made, a)
    assert found["weights"]["model.a"] == found["tensors"]["x"] == sha(a)


def test_what_is_turned_and_cast_has_a_hash_of_each_side(a):
    (made,), found = passed(Memory(a=a), item("x", "a", (6, 4), TURNED, dtype="bfloat16"))
    assert torch.equal(made, a.t().bfloat16())
    assert found["weights"]["model.a"] == sha(a) and found["tensors"]["x"] == sha(a.t().bfloat16())


def test_a_group_of_several_tensors_is_read_once():
    stack = torch.randn(5, 3, 2)
    source = Memory(e=stack)
    made, _ = passed(source, *(item(f"x{n}", "e", (2, 3), EXPERTS, n) for n in range(5)))
    assert source.read_of == {"e": 1}
    assert all(torch.equal(each, stack[n].t()) for n, each in enumerate(made))


def test_several_weights_become_one_tensor(a):
    (made,), found = passed(Memory(a=a, b=-a), item("x", "ab", (8, 6), Chain((Rows(2),))))
    assert torch.equal(made, torch.cat([a, -a])) and found["weights"].keys() == {"model.a", "model.b"}


def test_what_the_optimizer_keeps_is_read_and_named_by_its_kind(a):
    (made,), found = passed(Memory(a=a), item("x", "a", (4, 6), kind="exp_avg"))
    assert torch.equal(made, a * 2) and found["weights"] == {label("a", "exp_avg"): sha(a * 2)}


def test_numbers_that_are_not_finite_are_counted_under_the_weight(a):
    a[0, :2], a[3, 5] = torch.nan, torch.inf
    _, found = passed(Memory(a=a), item("x", "a", (4, 6)))
    assert found["odd"] == {"model.a": 3}


def test_a_type_that_is_too_small_is_told_under_the_tensor(a):
    a[1, 1] = 1e30
    (made,), found = passed(Memory(a=a), item("x", "a", (4, 6), dtype="float16"))
    assert made.isinf().sum() == 1 and found["odd"] == {"x": 1}


def test_another_shape_than_planned_is_an_error(a):
    with pytest.raises(CheckpointError, match=r"x became \[4, 6\], \[4, 5\] was planned"):
        passed(Memory(a=a), item("x", "a", (4, 5)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_type_can_be_counted(dtype):
    assert not_finite(torch.zeros(3, 3).to(dtype)) == 0


def test_a_tensor_without_numbers_is_finite():
    assert not_finite(torch.empty(0, 4)) == 0
