"""bfloat16 compute keeps float32 weights and sums, and any layout stays within rounding of one process."""

from __future__ import annotations

import pytest
import torch

from shardforge.core.layout import Layout
from tests.equivalence.cases import kept_types, two_steps

BF16 = {"precision": {"master": "fp32", "compute": "bf16", "reduce": "fp32"}, "model": {"head": "tied"}}
FP32 = {"precision": {"master": "fp32", "compute": "fp32", "reduce": "fp32"}, "model": {"head": "tied"}}
ROUNDING = 0.02  # relative; bfloat16 has 8 bits


@pytest.fixture(scope="module")
def wide(ranks):
    return ranks(1).run(two_steps, Layout(), FP32)[0]


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "rep2-dp2", "dp2-tp2"])
def test_bf16_compute_stays_within_rounding_of_fp32(ranks, wide, layout):
    wanted = Layout.parse(layout)
    got = ranks(wanted.world_size).run(two_steps, wanted, BF16)[0]
    for name in ("0 loss", "0 norm", "1 loss", "held-out loss"):
        torch.testing.assert_close(got[name], wide[name], rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("layout", ["one", "dp2-tp2"])
def test_bf16_compute_keeps_weights_gradients_and_moments_in_fp32(ranks, layout):
    wanted = Layout.parse(layout)
    assert ranks(wanted.world_size).run(kept_types, wanted, BF16)[0] == {torch.float32}


def test_bf16_compute_is_not_fp32_in_disguise(ranks, wide):
    got = ranks(1).run(two_steps, Layout(), BF16)[0]
    assert not torch.allclose(got["0 norm"], wide["0 norm"], rtol=1e-6)
