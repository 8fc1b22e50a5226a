"""Law 4 for where state is kept: ZeRO levels, moments in fewer bits, and the memory of the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shardforge.checkpoint.store import Store
from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from shardforge.engine.native import NativeEngine
from shardforge.parallel import offload
from shardforge.parallel.shelf import Lane
from shardforge.recipe.schema import CheckpointConfig
from tests.equivalence.cases import two_steps, whole
from tests.tiny import LENGTH, SEQUENCES, assert_same, batch, part, tiny
from tests.tiny_kinds import EVEN, OPTIONS

LAYOUTS = ["dp2", "dp4", "rep2-dp2", "dp2-tp2"]
MICRO = {"train": {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH, "micro_batch": 1}}
CASES: dict[str, dict[str, Any]] = {
    "dense": OPTIONS["dropout"],
    "bf16-states": {"optim": {"kind": "adamw", "states": "bf16"}},
    "tied": {"model": {"head": "tied", "stack": ["one x 4"]}},
    "experts": {"ffn": {"kind": "moe", "experts": 4, "k": 2, "inner": 8, "balance": EVEN}},
}
ELSEWHERE: dict[str, tuple[str, dict[str, Any]]] = {
    "tied 1f1b": ("pp2-dp2", {"schedule": "1f1b"}),
    "tied zbv": ("pp2-dp2", {"schedule": "zbv", "zero": 2}),
    "experts": ("dp2-tp2-ep2-etp2", {"recompute": "full"}),
    "dense cp": ("dp2-cp2", {}),
}
"""Case -> layout and engine options, where weights or activations live on other axes than dp and tp."""


class CopyLane(Lane):
    def out(self, x: Tensor) -> Tensor:
        return x.clone()

    def back(self, x: Tensor) -> Tensor:
        return x.clone()


def engine(**fields: Any) -> dict[str, Any]:
    return {"engine": {"kind": "native", **fields}}


def copied_two_steps(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """With activations that are really copied, as on a device with a memory of its own."""
    with patch.object(offload, "lane_of", lambda device_type: CopyLane()):
        return two_steps(layout, changes)


def gradients(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    made = build(layout, changes)
    made.forward_backward(part(batch(0), made.mesh.data_rank, layout.data_ranks), 0)
    return made.gradients()


def build(layout: Layout, changes: dict[str, Any]) -> NativeEngine:
    recipe = tiny(layout=layout, **changes)
    return recipe.engine.build(recipe, torch.device("cpu"))


def step(made: NativeEngine, index: int) -> None:
    layout = made.mesh.layout
    made.forward_backward(part(batch(index), made.mesh.data_rank, layout.data_ranks), index)
    made.update(0.01)


def store(made: NativeEngine, path: Path) -> Store:
    return Store(path, CheckpointConfig(asynchronous=False), describe=made.describe())


def saved(layout: Layout, changes: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """State after two steps, which is also committed under `path`."""
    made = build(layout, changes)
    for index in range(2):
        step(made, index)
    keeper = store(made, path)
    keeper.save(2, made.state(), {}, wait=True)
    keeper.close()
    return {name: whole(value) for name, value in made.state().items()}


def resumed(layout: Layout, changes: dict[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State as loaded from `path` into an engine of another seed, and after one step more."""
    made = build(layout, changes | {"seed": 2})
    keeper = store(made, path)
    made.load(lambda tensors: keeper.load(2, tensors))
    keeper.close()
    loaded = {name: whole(value) for name, value in made.state().items()}
    step(made, 2)
    return loaded, {name: whole(value) for name, value in made.state().items()}


@pytest.fixture(scope="module")
def alone(ranks):
    return functools.cache(lambda case: ranks(1).run(two_steps, Layout(), CASES[case])[0])


def compare(ranks, run, expected: dict[str, Tensor], layout: str, changes: dict[str, Any]) -> None:
    wanted = Layout.parse(layout)
    assert_same(ranks(wanted.world_size).run(run, wanted, changes)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_what_ranks_keep_whole_changes_no_gradient_under_accumulation(ranks, alone, zero, layout):
    compare(ranks, two_steps, alone("dense"), layout, CASES["dense"] | MICRO | engine(zero=zero))


def test_gradients_that_stay_whole_are_added_in_the_type_of_sums(ranks):
    """In bfloat16, the type of compute, four micro-batches would differ in the third digit."""
    types = {"precision": {"master": "fp32", "compute": "bf16", "reduce": "fp32"}}
    one, two = (ranks(2).run(gradients, Layout(dp_shard=2), MICRO | types | engine(zero=zero))[0] for zero in (1, 2))
    assert_same(one, two, rtol=1e-6)


@pytest.mark.parametrize(("layout", "zero"), [("one", 3), ("dp2", 1), ("dp4", 3), ("rep2-dp2", 1), ("dp2-tp2", 3)])
def test_an_optimizer_on_the_cpu_makes_the_same_step(ranks, alone, layout, zero):
    changes = CASES["dense"] | MICRO | engine(zero=zero, offload=["optimizer"])
    compare(ranks, two_steps, alone("dense"), layout, changes)


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("one", "none"), ("dp2", "full"), ("dp4", "none"), ("rep2-dp2", "full"), ("dp2-tp2", "none"), ("dp2-tp2", "full")],
)
def test_activations_that_leave_the_device_come_back_the_same(ranks, alone, layout, recompute):
    changes = CASES["dense"] | MICRO | engine(recompute=recompute, offload=["activations"])
    compare(ranks, copied_two_steps, alone("dense"), layout, changes)


def test_both_kinds_of_offload_and_moments_in_bf16_go_together(ranks, alone):
    changes = CASES["bf16-states"] | engine(recompute="full", zero=2, offload=["optimizer", "activations"])
    compare(ranks, copied_two_steps, alone("bf16-states"), "dp2-tp2", changes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_in_bf16_make_the_same_steps_on_any_layout(ranks, alone, layout):
    compare(ranks, two_steps, alone("bf16-states"), layout, CASES["bf16-states"])


@pytest.mark.parametrize("kept", ["optimizer", "activations"])
@pytest.mark.parametrize("case", ELSEWHERE)
def test_offload_goes_with_every_other_axis(ranks, alone, case, kept):
    layout, fields = ELSEWHERE[case]
    name = case.partition(" ")[0]
    compare(ranks, copied_two_steps, alone(name), layout, CASES[name] | MICRO | engine(**fields, offload=[kept]))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_experts_are_sharded_at_every_level_like_other_weights(ranks, alone, zero):
    compare(ranks, two_steps, alone("experts"), "dp4-ep2", CASES["experts"] | MICRO | engine(zero=zero))


@pytest.mark.parametrize(("first", "second"), [("dp2-tp2", "dp4"), ("dp4", "rep2-dp2"), ("rep2-dp2", "one")])
def test_moments_in_bf16_are_resumed_bit_for_bit_on_another_layout(ranks, tmp_path, first, second):
    before, after = Layout.parse(first), Layout.parse(second)
    kept = ranks(before.world_size).run(saved, before, CASES["bf16-states"], tmp_path)[0]
    loaded, _ = ranks(after.world_size).run(resumed, after, CASES["bf16-states"], tmp_path)[0]
    assert {value.dtype for name, value in loaded.items() if ".exp_avg" in name} == {torch.bfloat16}
    assert {name for name in kept if not torch.equal(loaded[name], kept[name])} == set()


@pytest.mark.parametrize("second", ["dp4", "dp2-tp2"])
def test_a_run_with_moments_in_bf16_goes_on_alike_on_any_layout(ranks, tmp_path, second):
    """Also the random roundings after the resume are the same."""
    ranks(1).run(saved, Layout(), CASES["bf16-states"], tmp_path)
    _, expected = ranks(1).run(resumed, Layout(), CASES["bf16-states"], tmp_path)[0]
    after = Layout.parse(second)
    _, got = ranks(after.world_size).run(resumed, after, CASES["bf16-states"], tmp_path)[0]
    assert {
        name for name in got if got[name].dtype == torch.bfloat16 and not torch.equal(got[name], expected[name])
    } == set()
    names = [name for name in got if name.startswith("model.")]
    assert_same({name: got[name] for name in names}, {name: expected[name] for name in names})


def test_selective_recompute_of_activations_that_leave_is_refused():
    with pytest.raises(ForgeError, match="out of reach of offload"):
        tiny(**engine(recompute="selective", offload=["activations"]))
