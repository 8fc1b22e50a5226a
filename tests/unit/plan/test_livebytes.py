from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardforge.plan.livebytes import LiveBytes


def test_a_tensor_counts_until_nothing_refers_to_it():
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x + 1
        assert live.now == 800
        del x
        assert live.now == 400
        del y
    assert (live.now, live.peak) == (0, 800)


def test_views_count_nothing():
    with LiveBytes() as live:
        x = torch.zeros(10, 10)
        y = x.T[2:]
        del x
        assert live.now == 400
        del y
        assert live.now == 0


def test_a_tensor_from_before_counts_once_it_is_added():
    x = torch.zeros(100)
    with LiveBytes() as live:
        y = x.view(50, 2)
        assert live.now == 400  # an operation has returned it
    with LiveBytes() as live:
        live.add(x)
        live.add(y)
        assert live.now == 400


def test_storage_that_is_freed_and_allocated_again_is_followed():
    with LiveBytes() as live:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert live.now == 0
        x.untyped_storage().resize_(400)
        assert live.now == 400


def test_resizing_is_itself_again_afterwards():
    before = torch.UntypedStorage.resize_
    with LiveBytes():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_what_autograd_keeps_counts_until_the_backward_pass():
    x = torch.zeros(100, requires_grad=True)
    with LiveBytes() as live:
        y = x.exp().sum()
        assert live.now == 404
        y.backward()
        del y
        assert live.settled() == 400  # the gradient


def test_fake_tensors_count_like_real_ones():
    def work() -> tuple[int, int]:
        with LiveBytes() as live:
            x = torch.zeros(64, 64, requires_grad=True)
            y = torch.nn.functional.silu(x @ x).sum()
            held = live.now
            y.backward()
        return held, live.peak

    with FakeTensorMode():
        fake = work()
    assert fake == work()
