from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardforge.model.build import build
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from shardforge.parallel import recompute
from tests.tiny import LENGTH, VOCAB, tiny

BLOCKS = 2
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS_OF_A_BLOCK = 6  # q, k, v, out, gate, up; nobody needs what down made


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count[op.overloadpacket.__name__] += 1
        return op(*args, **(kwargs or {}))


def model(kind: recompute.Recompute) -> nn.Module:
    recipe = tiny()
    made = build(recipe.model, recipe.objective.build(), torch.float64).to_empty(device="cpu")
    fill(made, 1)
    recompute.apply(made, kind)
    return made


def logits(made: nn.Module) -> torch.Tensor:
    positions = torch.arange(LENGTH)[None]
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    seq = Sequence(positions, torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64), dtype=torch.float64)
    return made(tokens, seq)


def repeated(kind: recompute.Recompute, *names: str) -> int:
    """Calls of these operations in the backward pass, beyond those without recompute."""
    counts = []
    for each in (kind, "none"):
        y = logits(model(each))
        with Calls() as calls:
            y.sum().backward()
        counts.append(sum(calls.count[name] for name in names))
    return counts[0] - counts[1]


def kept(kind: recompute.Recompute) -> int:
    """Numbers that autograd saves for the backward pass."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        logits(model(kind))
    return sum(sizes)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recompute_changes_no_gradient(kind):
    found = []
    for each in (kind, "none"):
        made = model(each)
        logits(made).square().sum().backward()
        found.append({name: weight.grad for name, weight in made.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_full_repeats_every_product_and_every_attention():
    assert repeated("full", "mm", "addmm", "bmm") == BLOCKS * PRODUCTS_OF_A_BLOCK
    assert repeated("full", ATTENTION) == BLOCKS


def test_selective_repeats_no_product_and_no_attention():
    assert repeated("selective", "mm", "addmm", "bmm", ATTENTION) == 0


def test_selective_repeats_the_elementwise_rest():
    assert repeated("selective", "mul", "silu") > 0


def test_recompute_keeps_less():
    assert kept("full") < kept("none") / 4


def test_none_leaves_the_blocks_as_they_are():
    assert all("forward" not in block.__dict__ for block in model("none").blocks.values())
