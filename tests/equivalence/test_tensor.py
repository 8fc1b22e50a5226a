"""Law 4 for what tensor parallelism adds: fewer key/value heads than ranks, latent attention, overlapped matmuls."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from shardforge.core.errors import ForgeError
from shardforge.core.layout import Layout
from tests.equivalence import traps
from tests.equivalence.cases import compare, two_steps
from tests.tiny import GLU, GQA, LENGTH, RTOL, SEQUENCES, tiny

LAYOUTS = ["tp2", "tp4", "dp2-tp2", "rep2-tp2"]
MLA = {
    "kind": "mla",
    "heads": 4,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 3,
    "qk_rope_head_dim": 2,
    "v_head_dim": 5,
}
YARN: dict[str, Any] = {"kind": "rope", "layout": "interleaved", "base": 10.0}
YARN["scaling"] = {"kind": "yarn", "factor": 8.0, "original_length": 8, "mscale": 0.7, "mscale_all_dim": 1.0}
EVERY_PART = {"bias": "all", "qk_norm": "rmsnorm", "qk_norm_over": "all"}
CASES: dict[str, dict[str, Any]] = {
    "one-kv-head": {"mixer": GQA | {"kv_heads": 1}},
    "two-kv-heads": {"mixer": GQA | {"kv_heads": 2}},
    "capped-scores": {"mixer": GQA | {"kv_heads": 2, "softcap": 0.7}},
    "one-kv-head-every-part": {"mixer": GQA | EVERY_PART | {"kv_heads": 1}},
    "two-kv-heads-every-part": {"mixer": GQA | EVERY_PART | {"heads": 8, "kv_heads": 2}},
    "two-kv-heads-layernorm": {"mixer": GQA | EVERY_PART | {"kv_heads": 2, "qk_norm": "layernorm"}},
    "all-biases-mlp": {"mixer": GQA | {"bias": "all"}, "ffn": {"kind": "mlp", "inner": 24, "bias": True}},
    "latent": {"mixer": MLA},
    "latent-queries": {"mixer": MLA | {"q_lora_rank": 7, "norm": "layernorm"}},
    "latent-absorbed": {"mixer": MLA | {"evaluation": "absorbed", "qk_rope_head_dim": 4, "position": YARN}},
    "shared-expert": {"ffn": {"kind": "moe", "experts": 4, "k": 2, "inner": 8, "shared": GLU | {"bias": True}}},
    "tied-softcap": {
        "model": {"head": {"kind": "softcap", "head": "tied"}, "embedding": {"kind": "learned", "length": 16}}
    },
}
TRAIN = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
OVERLAPPED: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute-full": {"recompute": "full"},
    "recompute-selective": {"recompute": "selective"},
    "kept-gathered": {"zero": 2},
}
"""Engine options beside which the overlap must stay exact."""


@pytest.fixture(scope="module")
def alone(ranks):
    """name -> the two steps of one process, computed once."""
    return functools.cache(lambda name: ranks(1).run(two_steps, Layout(), CASES[name])[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_any_layout_equals_one_process(ranks, alone, case, layout):
    compare(ranks, alone(case), layout, CASES[case])


def test_without_the_other_ranks_heads_the_shared_key_has_the_right_loss_and_wrong_gradients(ranks, alone):
    """k_r passes no weight that is split, so each rank's gradient of it is of its own heads alone."""
    got, expected = ranks(2).run(traps.bare_reader, Layout(tp=2), CASES["latent"])[0], alone("latent")
    assert abs(got["0 loss"] - expected["0 loss"]) < RTOL
    name, shared = "0 grad blocks.0.mixer.kv_down.weight", slice(MLA["kv_lora_rank"], None)
    assert (got[name] - expected[name])[shared].norm() > 0.1 * expected[name][shared].norm()
    name = "0 grad blocks.0.mixer.kv_norm.weight"
    assert (got[name] - expected[name]).norm() > 0.1 * expected[name].norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["two-kv-heads-every-part", "latent", "all-biases-mlp", "shared-expert"])
def test_overlapped_matmuls_equal_one_process(ranks, alone, case, layout):
    compare(ranks, alone(case), layout, CASES[case] | {"engine": {"kind": "native", "overlap": True}})


@pytest.mark.parametrize("layout", ["tp2", "dp2-tp2"])
@pytest.mark.parametrize("options", OVERLAPPED)
def test_overlap_stays_exact_beside_other_options(ranks, alone, options, layout):
    engine = {"kind": "native", "overlap": True} | OVERLAPPED[options]
    changes = CASES["latent-queries"] | {"engine": engine, "train": TRAIN | {"micro_batch": 1}}
    compare(ranks, alone("latent-queries"), layout, changes)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("layout", ["cp2-tp2", "pp2-tp2"])
@pytest.mark.parametrize("case", ["one-kv-head-every-part", "latent-queries", "tied-softcap"])
def test_beside_other_axes_it_equals_one_process(ranks, alone, case, layout, overlap):
    changes = {"engine": {"kind": "native", "overlap": overlap}, "train": TRAIN | {"micro_batch": 2}}
    compare(ranks, alone(case), layout, CASES[case] | changes)


def test_overlap_in_compiled_blocks_is_refused():
    with pytest.raises(ForgeError, match=r"overlap waits for collectives inside a block, which torch.compile cannot"):
        tiny(engine={"kind": "native", "overlap": True, "compiled": True})
