"""Three mistakes that leave the loss right and the gradient wrong: each put back, and caught."""

from __future__ import annotations

import pytest

from shardforge.core.layout import Layout
from tests.equivalence import traps
from tests.equivalence.cases import two_steps
from tests.tiny import GQA, RTOL

CHANGES = {"mixer": GQA | {"qk_norm": "rmsnorm"}}


def worst(got, expected, kind: str) -> float:
    names = [name for name in expected if name.startswith(f"0 {kind}")]
    return max(((got[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-30)).item() for n in names)


@pytest.fixture(scope="module")
def expected(ranks):
    return ranks(1).run(two_steps, Layout(), CHANGES)[0]


def test_a_weight_read_past_the_one_reader_gives_the_right_loss_and_wrong_gradients(ranks, expected):
    got = ranks(2).run(traps.bare_reader, Layout(tp=2), CHANGES)[0]
    assert worst(got, expected, "loss") < RTOL
    assert worst(got, expected, "grad") > 0.1


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_a_split_backward_pass_with_freed_weights_loses_gradients(ranks, schedule):
    right = ranks(4).run(traps.pipelined, schedule, 2)[0]
    wrong = ranks(4).run(traps.pipelined, schedule, 3)[0]
    assert abs(right["loss"] - wrong["loss"]) < 1e-12
    assert right["error"] < RTOL
    assert wrong["error"] > 0.1


@pytest.mark.slow
def test_an_unsettled_collective_before_a_compiled_block_loses_the_embedding_gradient(ranks, expected):
    got = ranks(4).run(traps.unsettled, Layout(dp_shard=2, tp=2), CHANGES)[0]
    assert worst(got, expected, "loss") < RTOL
    assert worst(got, expected, "grad") > 0.1
