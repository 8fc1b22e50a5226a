from __future__ import annotations

import pytest
import torch

from shardforge.train import peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_has_a_rate_in_each_type(monkeypatch, dtype):
    monkeypatch.setitem(peak.SIZE, "cpu", 16)
    assert 0 < peak.measure(torch.device("cpu"), dtype) < float("inf")


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    times = iter([0.0, 9.0] + [0.0, 4.0] * (peak.TRIES - 1) + [0.0, 2.0])
    monkeypatch.setitem(peak.SIZE, "cpu", 10)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: next(times))
    assert peak.measure(torch.device("cpu"), torch.float32) == 2 * 10**3 / 2.0
