from __future__ import annotations

import torch

from shardforge.model.masks.causal import Causal
from shardforge.plan.fake import KeepsConfig


def test_attention_that_only_keeps_has_a_gradient_for_each_of_its_inputs():
    shapes = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 5), "sinks": (4,)}
    given = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
    core = KeepsConfig().build(Causal(), 1.0, sinks=True)
    y = core(given["q"], given["k"], given["v"], None, given["sinks"])
    y.sum().backward()
    assert y.shape == (2, 6, 4, 5)
    assert {name: tuple(x.grad.shape) for name, x in given.items()} == shapes


def test_without_sinks_attention_that_only_keeps_needs_none():
    q, k, v = (torch.zeros(1, 3, 2, 4, requires_grad=True) for _ in range(3))
    KeepsConfig().build(Causal(), 1.0)(q, k, v, None).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))
