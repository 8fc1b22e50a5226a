from __future__ import annotations

import pytest
import torch

from shardforge.bench import moe
from shardforge.bench.peers_moe import Sizes, peers
from shardforge.core.errors import EngineError

SMALL = Sizes(tokens=24, hidden=32, inner=16, experts=8, k=3)


@pytest.fixture
def told():
    return []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_implementation_of_transformers_agrees_with_ours_and_is_timed_or_told_slow(told, dtype, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(moe, "SLOW", float("inf"))
    cost = moe.measure(SMALL, dtype, 1, told.append)
    assert set(cost.theirs) == {f"transformers {each}" for each in ("eager", "grouped_mm", "batched_mm")}
    assert set(cost.theirs) == set(cost.fastest) == set(cost.median)
    assert len(told) == len(cost.theirs)


def test_a_slow_peer_is_told_and_left_out(told, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(moe, "SLOW", 1.0)  # all but the fastest
    cost = moe.measure(SMALL, "fp32", 1, told.append)
    assert len(cost.theirs) == 1
    assert sum("not timed further" in line for line in told) == 2


def test_a_peer_that_computes_in_another_type_is_told_with_the_reason(told):
    pytest.importorskip("transformers")
    found = peers(SMALL, torch.float32, more=True, tell=told.append)
    assert not any("torchtitan" in each.name for each in found)
    assert told == ["not run: torchtitan, whose experts compute in bf16 from weights of any type"]


@pytest.mark.parametrize("name", ["output", "x", "router", "gate", "up", "down"])
def test_a_peer_that_differs_in_one_result_is_refused(name):
    x, grad, weights = moe.inputs(SMALL, torch.float32)
    layer = moe.ours(SMALL, torch.float32)
    layer.take(weights)
    _, mine = moe.results(layer, x, grad)
    assert moe.agree(mine, dict(mine), 1e-5, "peer") == 0.0
    other = mine | {name: mine[name] * (1 + 1e-3)}
    with pytest.raises(EngineError, match=f"peer differs from ours by .* in {name}"):
        moe.agree(mine, other, 1e-5, "peer")


def test_a_peer_without_numbers_is_refused():
    mine = {"output": torch.ones(2)}
    with pytest.raises(EngineError, match="nan"):
        moe.agree(mine, {"output": torch.full((2,), float("nan"))}, 1e-5, "peer")


def test_affinities_of_a_token_are_the_same_in_every_number_type_and_differ():
    x, _, weights = moe.inputs(SMALL, torch.bfloat16)
    exact = moe.inputs(SMALL, torch.float64)[0] @ weights["router"].double().T
    rounded = x @ weights["router"].bfloat16().T
    assert torch.equal(rounded.double(), exact)
    assert (exact.sort(-1).values.diff(dim=-1) == moe.STEP).all()


@pytest.mark.parametrize("text", ["2048x1024", "axbxc", "0x1024x256", "8x32x16"])
def test_a_shape_that_makes_no_layer_is_refused(text):
    with pytest.raises(EngineError, match="write it like"):
        moe.sizes(text)


def test_k_over_experts_is_refused():
    with pytest.raises(EngineError, match="k=9"):
        moe.sizes("8x32x16", experts=8, k=9)


def test_no_pairs_are_refused(told):
    with pytest.raises(EngineError, match="--pairs"):
        moe.run([SMALL], ["fp32"], 0, told.append)
