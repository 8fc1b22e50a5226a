"""Law 4 for multi-token prediction: the tokens ahead, the shared table and the loss are those of one process."""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.nn.batch import Batch
from shardforge.parallel.twins import Twins
from tests.equivalence.cases import compiled_two_steps, two_steps
from tests.tiny import GLU, GQA, LENGTH, SEQUENCES, assert_same, batch, part, tiny
from tests.tiny_kinds import EVERYWHERE, MOE, TIGHT

DENSE = {"mixer": GQA, "ffn": GLU}
ROUTER = {"kind": "topk", "score": "sigmoid", "selection_bias": {"rate": 0.05}}
FFN = MOE | {"router": ROUTER, "shared": GLU, "balance": EVERYWHERE, "z_loss": 0.1, "capacity": TIGHT}
EXPERTS = {"mixer": GQA | {"mask": {"kind": "window", "size": 5}}, "ffn": FFN}
MTP = {"depth": 2, "block": "experts", "weight": {"start": 0.7, "then": [{"at": 0.5, "value": 0.4}]}}


def case(block: dict[str, Any], mtp: dict[str, Any], **model: Any) -> dict[str, Any]:
    blocks = {"dense": DENSE, "experts": block}
    model = {"blocks": blocks, "stack": ["dense x 2"], "mtp": MTP | mtp} | model
    return {"model": model, "objective": {"kind": "next_token", "z_loss": 0.01}}


CASES = {
    "dense": case(DENSE | {"residual": {"kind": "pre", "dropout": 0.3}}, {"hidden": "after_norm"}, dropout=0.2),
    "experts": case(EXPERTS, {}),
    "tied": case(EXPERTS, {"concat": "hidden_first"}, head="tied", embedding={"kind": "learned", "length": LENGTH}),
}
TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
HALVES = {"train": TRAIN | {"micro_batch": 2}}
SPLIT = {"zero": 2, "stages": "0 | 1 | 1 | 0"}  # the first stage is the embedding, the last all that follows the blocks
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("dense", "tp2", {"engine": {"overlap": True}}),
    ("dense", "dp2", {"engine": {"zero": 1, "offload": ["optimizer", "activations"]}} | HALVES),
    ("dense", "cp2", {"engine": {"recompute": "full"}}),
    ("dense", "pp2", HALVES),
    ("experts", "dp2-ep2", {"engine": {"zero": 2, "recompute": "full"}} | HALVES),
    ("experts", "cp2-tp2-ep2-etp2", {}),
    ("experts", "pp2-dp2-ep2", HALVES),
    ("experts", "pp2", {"engine": SPLIT | {"schedule": "zero_bubble"}} | HALVES),
    ("tied", "dp2-tp2", {"engine": {"zero": 3}} | HALVES),
    ("tied", "pp2-tp2", HALVES),
    ("dense", "pp2-cp2", {"engine": SPLIT | {"schedule": "zbv"}} | HALVES),
]
"""(case, layout, how a step is computed)."""


def shifted_too_late(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The tokens ahead are looked up among the columns that a cp rank has: Megatron-LM once refused cp for that."""
    right = Batch.look_ahead

    def at(self: Batch, index: Tensor) -> Batch:
        return right(place(self, index), len(self.ahead))

    place = Batch.at
    with patch.object(Batch, "at", at):
        return two_steps(layout, changes)


def forgotten(layout: Layout, changes: dict[str, Any]) -> dict[str, Tensor]:
    """The last stage keeps its gradient of the embedding to itself."""
    with patch.object(Twins, "settle", lambda self: None):
        return two_steps(layout, changes)


def held_out(layout: Layout, changes: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Loss and terms of an evaluation before the first step."""
    recipe = tiny(layout=layout, **changes)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    losses = engine.evaluate(part(batch(9), engine.mesh.data_rank, layout.data_ranks))
    return losses.loss, dict(losses.terms)


@pytest.fixture(scope="module")
def alone(ranks):
    """Name -> the two steps of one process, computed once."""
    return functools.cache(lambda name: ranks(1).run(two_steps, Layout(), CASES[name])[0])


def together(ranks, layout: str, changes: dict[str, Any], run=two_steps) -> dict[str, Tensor]:
    wanted = Layout.parse(layout)
    return ranks(wanted.world_size).run(run, wanted, changes)[0]


@pytest.mark.parametrize(("name", "layout", "step"), ROWS, ids=[f"{name}-{layout}" for name, layout, _ in ROWS])
def test_any_layout_predicts_further_tokens_as_one_process(ranks, alone, name, layout, step):
    assert_same(together(ranks, layout, CASES[name] | step), alone(name))


@pytest.mark.parametrize(
    ("mistake", "name", "layout", "step", "wrong"),
    [
        (shifted_too_late, "dense", "cp2", {}, "mtp.0.project.weight"),
        (forgotten, "dense", "pp2", HALVES, "embed.weight"),
    ],
)
def test_a_mistake_behind_a_right_main_loss_is_caught(ranks, alone, mistake, name, layout, step, wrong):
    got, expected = together(ranks, layout, CASES[name] | step, mistake), alone(name)
    assert torch.allclose(got["0 loss"][0], expected["0 loss"][0], rtol=1e-12)
    with pytest.raises(AssertionError, match=f"0 grad {wrong}"):
        assert_same(got, expected)


def test_evaluation_reports_the_main_loss_alone_and_the_further_tokens_as_a_term(ranks):
    bare = {key: value for key, value in CASES["experts"]["model"].items() if key != "mtp"} | {
        "blocks": {"dense": DENSE}
    }
    ((loss, terms),) = ranks(1).run(held_out, Layout(), CASES["experts"])
    ((expected, _),) = ranks(1).run(held_out, Layout(), {"model": bare})
    assert loss == expected and 0 < terms["mtp"]


def test_of_no_depth_the_step_is_the_one_without_the_section_to_the_last_bit(ranks):
    model = {"stack": ["one x 2"], "mtp": {"block": "one", "depth": 0}}
    got, expected = (ranks(1).run(two_steps, Layout(), {"model": each})[0] for each in (model, {"stack": ["one x 2"]}))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_compiled_modules_of_further_tokens_equal_eager_ones(ranks, alone):
    got = together(ranks, "dp2", CASES["dense"] | {"engine": {"compiled": True}}, compiled_two_steps)
    got.pop("graphs")
    assert_same(got, alone("dense"))
