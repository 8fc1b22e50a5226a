"""DeepSeek's config.json: the released ones mean our recipes, and a field that cannot be computed is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.family import families
from shardforge.families.publish import publish
from shardforge.families.section import apart, whole
from shardforge.families.settings import Settings
from shardforge.families.statemap import StateMap
from shardforge.recipe.load import load_model, shipped
from shardforge.recipe.provenance import plain
from tests.tiny_deepseek import MTP, SIGMOID, SOFTMAX, section, shapes, weights

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
SHARED = LATENT | {
    **{"attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "hidden_act": "silu", "moe_layer_freq": 1},
    **{"pretraining_tp": 1, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "use_cache": True},
    **{"seq_aux": True, "aux_loss_alpha": 0.001, "initializer_range": 0.02, "torch_dtype": "bfloat16"},
}
LITE = {
    **{"hidden_size": 2048, "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "vocab_size": 102400, "q_lora_rank": None, "max_position_embeddings": 163840},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False},
    **{"scoring_func": "softmax", "routed_scaling_factor": 1.0, "model_type": "deepseek_v2"},
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
GREAT = LITE | {
    **{"hidden_size": 5120, "intermediate_size": 12288, "num_hidden_layers": 60, "num_attention_heads": 128},
    **{"num_key_value_heads": 128, "q_lora_rank": 1536, "n_routed_experts": 160, "moe_intermediate_size": 1536},
    **{"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
}
THIRD = {
    **{"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128},
    **{"num_key_value_heads": 128, "vocab_size": 129280, "q_lora_rank": 1536, "max_position_embeddings": 163840},
    **{"n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
    **{"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": True},
    **{"scoring_func": "sigmoid", "routed_scaling_factor": 2.5, "model_type": "deepseek_v3"},
    **{"num_nextn_predict_layers": 1, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
}
MOONLIGHT = THIRD | {
    **{"hidden_size": 2048, "intermediate_size": 11264, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "vocab_size": 163840, "q_lora_rank": None, "max_position_embeddings": 8192},
    **{"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446},
    **{"rms_norm_eps": 1e-5, "rope_theta": 50000.0, "num_nextn_predict_layers": 0, "rope_scaling": None},
}
RELEASED = {
    "deepseek-v2-lite": (V2, LITE),
    "deepseek-v2": (V2, GREAT),
    "deepseek-v3": (V3, THIRD),
    "moonlight-16b-a3b": (V3, MOONLIGHT),
}
STRETCHED = {"kind": "yarn", "factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
MSCALE = {
    **{name: {"mscale": 0.707, "mscale_all_dim": 0.707} for name in ("deepseek-v2", "deepseek-v2-lite")},
    "deepseek-v3": {"mscale": 1.0, "mscale_all_dim": 1.0},
}


def recipe(name: str) -> dict[str, Any]:
    return plain(load_model(shipped() / "models" / f"{name}.yaml").recipe.model)


def read(architecture: str, told: dict[str, Any]) -> dict[str, Any]:
    settings = Settings({"architectures": [architecture]} | told, Path("config.json"))
    found = families()[settings.get("architectures")[0]].model(settings)
    settings.settle()
    return whole(found, "config.json")


def wrong(**changes: Any) -> str:
    with pytest.raises(Problems) as caught:
        read(V3, SHARED | THIRD | changes)
    return str(caught.value)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_configuration_is_our_recipe_with_its_stretched_positions(name):
    architecture, told = RELEASED[name]
    ours = recipe(name)
    for block in ours["blocks"].values():
        block["mixer"]["position"]["scaling"] = STRETCHED | MSCALE[name] if name in MSCALE else None
    assert apart(read(architecture, SHARED | told), whole(ours, name)) == []


@pytest.mark.parametrize("name", RELEASED)
def test_our_recipe_is_said_in_the_words_of_its_family(name):
    published = publish(recipe(name), name)
    assert (published.family.architectures, published.left) == ((RELEASED[name][0],), ())


@pytest.mark.parametrize("name", RELEASED)
def test_what_we_write_for_a_recipe_are_the_released_values(name):
    written, released = publish(recipe(name), name).config, SHARED | RELEASED[name][1]
    apart_by_intent = {"initializer_range", "rope_scaling"}  # std 0.006 of the paper, and before the context was grown
    assert not {
        field: (value, released[field])
        for field, value in written.items()
        if field in released and value != released[field] and field not in apart_by_intent
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"first_k_dense_replace": "all"}, "first_k_dense_replace='all'"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"topk_group": 2}, "num_experts_per_tok=8, topk_group=2"),
        ({"n_shared_experts": None}, "n_shared_experts is missing"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale=1.0: programs disagree"),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0}}, "mscale=1.0, mscale_all_dim=0"),
        ({"index_topk": 2048}, "index_topk=2048"),
    ],
)
def test_a_field_that_is_not_computed_is_named(changes, told):
    assert told in wrong(**changes)


def test_fields_of_mixtures_mean_nothing_without_them():
    dense = read(V3, SHARED | THIRD | {"n_routed_experts": None, "num_nextn_predict_layers": 0})
    assert {block["ffn"]["kind"] for block in dense["blocks"].values()} == {"glu"}


def test_modules_of_further_tokens_are_mixtures():
    assert "n_routed_experts is missing" in wrong(n_routed_experts=None)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"mtp": MTP | {"hidden": "before_norm"}}, "mtp.hidden: 'before_norm' here, 'after_norm' there"),
        ({"mtp": MTP | {"concat": "hidden_first"}}, "mtp.concat"),
        ({"router": SIGMOID | {"selection_bias": None}}, "selection_bias: None here"),
        ({"q_lora_rank": 6, "norm": {"kind": "rmsnorm", "eps": 1e-5}}, "layers.mixer.norm.eps: 1e-05 here"),
        ({"mask": {"kind": "window", "size": 8}}, "layers.mixer.mask"),
        ({"router": SOFTMAX | {"weights": "renormalized"}}, "layers.ffn.router.weights"),
    ],
)
def test_a_model_that_is_not_quite_theirs_is_told_what_differs(changed, told):
    with pytest.raises(CheckpointError, match="no published family can say this model") as caught:
        publish(section(**changed), "here")
    assert told in str(caught.value)


@pytest.mark.parametrize("shared", [None, {"kind": "glu", "inner": 7}])
def test_a_shared_unit_that_is_no_multiple_of_an_expert_has_no_words(shared):
    found = section()
    found["blocks"]["moe"]["ffn"]["shared"] = shared
    with pytest.raises(CheckpointError, match=r"layers\.ffn\.shared"):
        publish(whole(found, "here"), "here")


@given(
    router=st.sampled_from([SIGMOID, SOFTMAX]),
    further=st.booleans(),
    layout=st.sampled_from(["interleaved", "half"]),
    tied=st.booleans(),
    heads=st.integers(1, 4),
    rank=st.none() | st.integers(1, 5),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
)
def test_there_and_back_is_the_same_bit_for_bit_whatever_the_sizes(router, further, layout, tied, heads, rank, widths):
    latent, plain_width, half_width, value = widths
    mixer = {"heads": heads, "q_lora_rank": rank, "kv_lora_rank": latent, "qk_nope_head_dim": plain_width}
    mixer |= {"qk_rope_head_dim": 2 * half_width, "v_head_dim": value}
    model = section(router, MTP if further and router is SIGMOID else None, layout, **mixer)
    model["head"] = {"kind": "tied" if tied else "linear"}
    model = whole(model, "tiny")
    ours = weights(model)
    mapped = StateMap(publish(model, "tiny").family.table(model), shapes(model))
    theirs = dict(mapped.to(lambda name: ours[name]))
    back = dict(mapped.back(lambda name: theirs[name]))
    assert (mapped.unnamed, back.keys()) == ([], ours.keys())
    assert all(back[name].equal(each) for name, each in ours.items())
