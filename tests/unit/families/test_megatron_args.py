"""A model in the arguments of Megatron says the same model again, or is refused by the name of a field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import CheckpointError
from shardforge.families.megatron_args import arguments, differing
from shardforge.families.megatron_model import model
from shardforge.families.section import whole
from shardforge.families.settings import Settings
from shardforge.recipe.load import load_model
from shardforge.recipe.provenance import plain

RECIPES = Path(__file__).parents[3] / "recipes" / "models"
SAID = ("llama3-8b", "qwen2.5-72b", "qwen3-30b-a3b", "mixtral-8x7b", "llm-jp-3-8x13b", "drop-upcycling-8x3.7b")
SAID += ("deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b", "gpt2-124m")
HIDDEN, VOCAB, LENGTH = 16, 32, 64
NORM = {"kind": "rmsnorm", "eps": 1e-5}
GQA = {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 4}
MLA = {"kind": "mla", "heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
MLA |= {"v_head_dim": 6, "norm": NORM, "position": {"kind": "rope", "layout": "interleaved"}}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 32}
GLU = {"kind": "glu", "inner": 24}
MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 20}
SIGMOID = {"kind": "topk", "score": "sigmoid", "scale": 2.5, "selection_bias": {}}


def rope(**more: Any) -> dict[str, Any]:
    return {"kind": "rope", "base": 5e5, **more}


def section(mixer: dict[str, Any] = GQA, ffn: dict[str, Any] = GLU, **more: Any) -> dict[str, Any]:
    block = {"mixer": mixer, "ffn": ffn, "residual": {"kind": "pre", "norm": NORM}}
    told = {"vocab": VOCAB, "hidden": HIDDEN, "blocks": {"one": block}, "stack": ["one x 3"], "norm": NORM}
    return whole(told | more, "test")


def two(first: dict[str, Any], second: dict[str, Any], stack: list[str]) -> dict[str, Any]:
    residual = {"residual": {"kind": "pre", "norm": NORM}}
    blocks = {"one": {"mixer": GQA, "ffn": GLU} | residual | first, "two": {"mixer": GQA, "ffn": GLU} | residual}
    blocks["two"] |= second
    return section(blocks=blocks, stack=stack)


SECTIONS = {
    "plain": section(),
    "tied": section(head="tied"),
    "half of a head": section(GQA | {"position": rope(fraction=0.5, layout="interleaved")}),
    "slower": section(GQA | {"position": rope(scaling={"kind": "linear", "factor": 2.0})}),
    "llama 3": section(GQA | {"position": rope(scaling={"kind": "llama3", "factor": 8.0, "original_length": 8192})}),
    "ntk": section(GQA | {"position": rope(scaling={"kind": "ntk", "factor": 2.0})}),
    "yarn": section(GQA | {"position": rope(scaling=YARN)}),
    "biased": section(GQA | {"bias": "all"}, {"kind": "mlp", "inner": 24, "bias": True}),
    "biased queries": section(GQA | {"bias": "qkv", "qk_norm": NORM}),
    "relu squared": section(GQA, {"kind": "mlp", "inner": 24, "activation": "relu2"}),
    "learned": section(GQA | {"position": "nope"}, embedding={"kind": "learned", "length": LENGTH}),
    "no order": section(GQA | {"position": "nope"}),
    "window": section(GQA | {"mask": {"kind": "window", "size": 8}}),
    "every other near": two({"mixer": GQA | {"mask": {"kind": "window", "size": 8}}}, {}, ["(one two) x 2"]),
    "every third free": two({}, {"mixer": GQA | {"position": "nope"}}, ["one x 2", "two"]),
    "sinks": section(GQA | {"sinks": "learned"}),
    "scale": section(GQA | {"scale": 0.25}),
    "latent": section(MLA),
    "latent of pairs apart": section(MLA | {"position": rope()}),
    "latent yarn": section(MLA | {"position": rope(layout="interleaved", scaling=YARN)}),
    "latent sharp": section(
        MLA | {"position": rope(layout="interleaved", scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7})}
    ),
    "straight queries": section(MLA | {"q_lora_rank": None}),
    "mixture": section(GQA, MOE),
    "raw weights": section(GQA, MOE | {"router": {"kind": "topk", "weights": "raw"}}),
    "sigmoid": section(GQA, MOE | {"router": SIGMOID | {"groups": 2, "group_topk": 1}}),
    "shared": section(GQA, MOE | {"shared": GLU, "shared_gate": "sigmoid"}),
    "mixtures behind a dense layer": two({}, {"ffn": MOE}, ["one", "two x 2"]),
    "clamped": section(
        GQA | {"bias": "all"}, MOE | {"bias": True, "clamp": 7.0, "router": {"kind": "topk", "bias": True}}
    ),
    "further": section(mtp={"block": "one", "depth": 2, "hidden": "after_norm", "norm": NORM}),
}


def read(args: dict[str, Any]) -> dict[str, Any]:
    settings = Settings(args, Path("args"))
    found = model(settings)
    assert not settings.problems
    return whole(found, "args")


@pytest.mark.parametrize("name", SECTIONS)
def test_a_model_comes_back_from_its_arguments(name):
    assert differing(SECTIONS[name], read(arguments(SECTIONS[name], VOCAB, LENGTH))) == []


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        (section(GQA | {"qk_norm": NORM, "qk_norm_over": "all"}), "qk_norm_over"),
        (section(GQA, GLU | {"activation": "gelu"}), "activation"),
        (
            section(GQA | {"position": rope(scaling={"kind": "dynamic", "factor": 2.0, "original_length": 9})}),
            "scaling",
        ),
        (section(MLA | {"norm": NORM | {"eps": 1e-6}}), r"mixer.norm.eps: 1e-06 here, 1e-05 there"),
        (section(GQA, MOE | {"router": SIGMOID | {"weights": "raw"}}), "router.weights"),
        (section(mtp={"block": "one", "norm": NORM}), "mtp.hidden"),
        (two({"mixer": GQA | {"heads": 8}}, {}, ["one", "two"]), "mixer.heads"),
        (section(head={"kind": "softcap", "cap": 30.0}), "head.kind"),
    ],
)
def test_what_megatron_cannot_say_is_refused_by_name(changed, field):
    with pytest.raises(CheckpointError, match=field):
        arguments(changed, VOCAB, LENGTH)


@pytest.mark.parametrize("name", SAID)
def test_published_models_are_said(name):
    told = plain(load_model(RECIPES / f"{name}.yaml").recipe.model)
    assert differing(told, read(arguments(told, told["vocab"], LENGTH))) == []


GATED: dict[str, Any] = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_layer_freq": 2}
TWO = ["aux_loss", "seq_aux_loss"]
INTERPOLATED: dict[str, Any] = {"rotary_seq_len_interpolation_factor": 2}


def misread(args: dict[str, Any]) -> list[str]:
    """Problems of the arguments of a plain model with changes."""
    settings = Settings(arguments(section(), VOCAB, LENGTH) | args, Path("args"))
    model(settings)
    return [problem.what for problem in settings.problems]


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value"),
        ({"glu_linear_offset": 1.0}, "glu_linear_offset"),
        ({"use_rope_scaling": True} | INTERPOLATED, "rotary_seq_len_interpolation_factor"),
        (
            {"position_embedding_type": "yarn", "yarn_original_max_position_embeddings": 8} | INTERPOLATED,
            "rotary_seq_len_interpolation_factor",
        ),
        (GATED | {"moe_router_load_balancing_type": "sinkhorn"}, "moe_router_load_balancing_type"),
        (GATED | {"moe_router_load_balancing_type": ["sinkhorn"]}, "moe_router_load_balancing_type"),
        (GATED | {"moe_router_load_balancing_type": TWO, "moe_aux_loss_coeff": [0.1]}, "moe_aux_loss_coeff"),
        (GATED | {"moe_router_topk_limited_devices": 2}, "moe_router_topk_limited_devices"),
        ({"multi_latent_attention": True, "rope_type": "rope", "rotary_percent": 0.5}, "rotary_percent"),
    ],
)
def test_what_an_argument_asks_for_beyond_is_refused_by_name(changed, field):
    assert [line.partition("=")[0] for line in misread(changed)] == [field]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"use_rope_scaling": True},
        INTERPOLATED,
        GATED | {"moe_router_load_balancing_type": TWO, "moe_aux_loss_coeff": [0.1, 0.2]},
        GATED | {"moe_router_load_balancing_type": "none"},
        {"multi_latent_attention": True, "rope_type": "rope", "rotary_percent": 1.0},
    ],
)
def test_what_is_within_is_read(changed):
    assert misread(changed) == []
