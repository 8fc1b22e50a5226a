from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import CheckpointError
from shardforge.families.family import families
from shardforge.families.publish import publish
from shardforge.families.section import whole
from shardforge.recipe.load import load_model
from shardforge.recipe.provenance import plain

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "models").glob("*.yaml"))
NORM = {"kind": "rmsnorm", "eps": 1e-5}


def section(mixer: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, **(mixer or {})},
        "ffn": ffn or {"kind": "glu", "inner": 40},
        "residual": {"kind": "pre", "norm": NORM},
    }
    told = {"vocab": 48, "hidden": 24, "blocks": {"dense": block}, "stack": ["dense x 3"], "norm": NORM, **top}
    return whole(told, "the test")


def moe(**more: Any) -> dict[str, Any]:
    return {"kind": "moe", "experts": 4, "k": 2, "inner": 8, **more}


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.stem for recipe in RECIPES])
def test_every_published_model_that_is_shipped_has_a_family(recipe):
    assert publish(plain(load_model(recipe).recipe.model), recipe).config["architectures"][0] in families()


QK = {"qk_norm": NORM}
WINDOW = {"mask": {"kind": "window", "size": 4}}
SAID = {
    "LlamaForCausalLM": section(),
    "MistralForCausalLM": section(WINDOW),
    "Qwen2ForCausalLM": section({"bias": "qkv"}),
    "Qwen3ForCausalLM": section(QK),
    "MixtralForCausalLM": section(ffn=moe()),
    "Qwen3MoeForCausalLM": section(QK, moe()),
    "OlmoeForCausalLM": section(QK | {"qk_norm_over": "all", "head_dim": 6}, moe()),
}


@pytest.mark.parametrize("architecture", SAID)
def test_a_model_is_said_by_the_architecture_that_computes_it(architecture):
    assert publish(SAID[architecture], "the test").config["architectures"] == [architecture]


UNSAID = {
    "channels that do not turn": section({"position": {"kind": "rope", "fraction": 0.5}}),
    "yarn over turns": section(
        {
            "position": {
                "kind": "rope",
                "scaling": {"kind": "yarn", "factor": 2.0, "original_length": 8, "ramp": "rotation"},
            }
        }
    ),
    "a scale of its own": section({"scale": 0.3}),
    "biases on the gated unit alone": section(ffn={"kind": "glu", "inner": 8, "bias": True}, mixer=QK),
    "heads wider than OLMoE has them": section(QK | {"qk_norm_over": "all"}, moe()),
    "experts without room": section(ffn=moe(capacity={"factor": 1.25})),
    "a shared expert": section(ffn=moe(shared={"kind": "glu", "inner": 8})),
    "mixtures of other routers": section(ffn=moe(k=1, router={"kind": "switch"})),
    "another norm": section(norm={"kind": "layernorm"}),
    "norms that differ": section(norm=NORM | {"eps": 1e-3}),
    "positions that are learned and turn": section(embedding={"kind": "learned", "length": 9}),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_no_family_computes_is_refused(case):
    with pytest.raises(CheckpointError, match="no published family"):
        publish(UNSAID[case], "the test")


def test_what_is_refused_names_the_field_and_both_values():
    with pytest.raises(CheckpointError, match=re.escape("layers.mixer.scale: 0.3 here, 0.3535533905932738 there")):
        publish(UNSAID["a scale of its own"], "the test")


def test_a_loss_for_even_use_is_written_as_transformers_counts_it():
    said = publish(section(ffn=moe(balance=[{"scope": "layers", "weight": 0.06}])), "the test")
    assert said.config["router_aux_loss_coef"] == pytest.approx(0.03) and said.config["output_router_logits"]
    assert said.left == ()


def test_a_loss_that_transformers_lacks_is_listed():
    said = publish(section(ffn=moe(balance=[{"scope": "sequence", "weight": 0.06}], z_loss=0.001)), "the test")
    assert said.config["output_router_logits"] is False
    assert {line.partition(" ")[0] for line in said.left} >= {"layers.ffn.z_loss:"}
    assert any("balance" in line for line in said.left)


@pytest.mark.parametrize("token", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_tokens_that_nobody_names_are_null(token):
    assert publish(section(), "the test").config[token] is None


def test_a_base_stands_for_an_ntk_scaling():
    position = {"kind": "rope", "base": 100.0, "scaling": {"kind": "ntk", "factor": 2.0}}
    config = publish(section({"position": position}), "the test").config
    assert config["rope_theta"] == pytest.approx(100.0 * 2.0 ** (8 / 6)) and "rope_scaling" not in config


def test_the_length_that_dynamic_positions_start_from_is_the_longest():
    position = {"kind": "rope", "scaling": {"kind": "dynamic", "factor": 2.0, "original_length": 77}}
    assert publish(section({"position": position}), "the test").config["max_position_embeddings"] == 77
