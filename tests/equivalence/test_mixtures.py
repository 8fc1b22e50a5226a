"""Law 4 for what is counted over a whole batch: losses, tallies and remembered biases are those of one process.

Biases, loads and dropped tokens must be the same to the last bit, see `assert_same`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.engine.forward import Forward
from shardforge.engine.native import NativeEngine
from shardforge.nn import counter
from tests.equivalence.mixtures import CASES
from tests.equivalence.rows import two_steps
from tests.tiny import LENGTH, SEQUENCES, assert_same

TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
HALVES = {"train": TRAIN | {"micro_batch": 2}}
LAYOUTS = ["dp2-tp2-ep2", "pp2-cp2-ep2"]


def changes(case: str, layout: Layout) -> dict[str, Any]:
    return CASES[case] | (HALVES if layout.pp > 1 else {})


def together(ranks, layout: str, case: str, step: dict[str, Any] | None = None, run: Callable = two_steps):
    wanted = Layout.parse(layout)
    return ranks(wanted.world_size).run(run, wanted, changes(case, wanted) | (step or {}), "padded")[0]


def summed_apart(layout: Layout, changes: dict[str, Any], data: str) -> dict[str, Tensor]:
    """Biases follow the loads of the data ranks with the same place in tp: Megatron-LM once summed over these only."""
    losses, settle = NativeEngine.losses, NativeEngine.settle

    def kept(self: NativeEngine, forward: Forward) -> Any:
        self.own = {layer: value.clone() for (layer, name), value in forward.tallies.items() if name == "load"}
        return losses(self, forward)

    def apart(self: NativeEngine) -> None:
        self.loads = {layer: self.total(load, self.mesh.data) for layer, load in self.own.items()}
        settle(self)

    with patch.multiple(NativeEngine, losses=kept, settle=apart):
        return two_steps(layout, changes, data)


def last_micro_batch(layout: Layout, changes: dict[str, Any], data: str) -> dict[str, Tensor]:
    """Loads are those of the last micro-batch, as if nothing were accumulated."""
    call = Forward.__call__

    def forgetful(self: Forward, part: Any, x: Tensor | None, micro: int) -> Tensor:
        self.tallies = {key: torch.zeros_like(value) for key, value in self.tallies.items()}
        return call(self, part, x, micro)

    with patch.object(Forward, "__call__", forgetful):
        return two_steps(layout, changes, data)


def counted_apart(layout: Layout, changes: dict[str, Any], data: str) -> dict[str, Tensor]:
    """Each rank balances by the loads of its own tokens."""

    def counted(self: NativeEngine, forward: Forward) -> dict[int, Tensor]:
        return {layer: value for (layer, name), value in forward.tallies.items() if name == "load"}

    with patch.object(NativeEngine, "counted", counted):
        return two_steps(layout, changes, data)


def drawn_by_rank(layout: Layout, changes: dict[str, Any], data: str) -> dict[str, Tensor]:
    """Every rank has chance of its own."""
    key = counter.key

    def own(seed: int, *names: Any) -> int:
        return key(seed, *names) + (dist.get_rank() if "dropout" in names else 0)

    with patch.object(counter, "key", own):
        return two_steps(layout, changes, data)


@pytest.fixture(scope="module")
def alone(ranks):
    """Name -> the two steps of one process, computed once."""
    return functools.cache(lambda case: ranks(1).run(two_steps, Layout(), CASES[case], "padded")[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_any_mixture_equals_one_process(ranks, alone, case, layout):
    assert_same(together(ranks, layout, case), alone(case))


@pytest.mark.parametrize("case", ["deepseek", "biases-and-room"])
def test_two_steps_move_the_biases_and_some_choices_with_them(ranks, alone, case):
    """Or the cases above would prove nothing."""
    found = alone(case)
    biases = {name: value for name, value in found.items() if "selection_bias" in name}
    assert len(biases) == 4 and all(bias.abs().max() > 0 for bias in biases.values())
    assert any(not torch.equal(found[f"0 load {layer}"], found[f"1 load {layer}"]) for layer in range(2))


@pytest.mark.parametrize(
    ("mistake", "case", "layout", "step", "wrong"),
    [
        (summed_apart, "deepseek", "tp2", {}, "0 remembered blocks.0.ffn.router.selection_bias: "),
        (summed_apart, "deepseek", "tp2-ep2", {}, "0 remembered blocks.0.ffn.router.selection_bias: "),
        (last_micro_batch, "deepseek", "dp2", HALVES, "0 remembered blocks.0.ffn.router.selection_bias: "),
        (counted_apart, "layers", "dp2", {}, "0 grad blocks.0.ffn.router.weight"),
        (drawn_by_rank, "switch", "dp2", {}, "0 grad blocks.0.ffn.router.weight"),
    ],
)
def test_a_mistake_in_what_is_counted_is_caught(ranks, alone, mistake, case, layout, step, wrong):
    with pytest.raises(AssertionError, match=wrong):
        assert_same(together(ranks, layout, case, step, mistake), alone(case))
