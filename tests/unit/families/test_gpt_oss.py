"""gpt-oss as it was released: its config.json, and experts in MXFP4."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.kinds.gpt_oss import FAMILY
from shardforge.families.open import open_source
from shardforge.families.publish import publish
from shardforge.families.section import apart, whole
from shardforge.families.settings import Settings
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from shardforge.recipe.load import load_model, shipped
from shardforge.recipe.provenance import plain
from tests.tiny import tiny

RELEASED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 201088,
}
SIZES = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}
"""Layers and experts."""


def released(name: str, **changes: Any) -> Settings:
    layers, experts = SIZES[name]
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    sizes = {"num_hidden_layers": layers, "num_local_experts": experts, "layer_types": kinds}
    return Settings(RELEASED | sizes | changes, Path("config.json"))


def read(settings: Settings) -> dict[str, Any]:
    told = FAMILY.model(settings)
    settings.settle()
    return whole(told, "config.json")


def recipe(name: str) -> dict[str, Any]:
    return plain(load_model(shipped() / "models" / f"{name}.yaml").recipe.model)


@pytest.mark.parametrize("name", SIZES)
def test_the_released_settings_are_the_recipe(name):
    assert apart(recipe(name), read(released(name))) == []


@pytest.mark.parametrize("name", SIZES)
def test_the_recipe_is_published_in_the_released_words(name):
    found = publish(recipe(name), name).config
    silent = ("eos_token_id", "max_position_embeddings", "use_cache", "initial_context_length", "router_aux_loss_coef")
    wanted = {key: value for key, value in released(name).data.items() if key not in silent}
    assert {key: found.get(key) for key in wanted} == wanted


def test_without_a_scaling_positions_are_those_of_the_release():
    absent = released("gpt-oss-20b", rope_scaling=None, rope_theta=None)
    assert apart(read(released("gpt-oss-20b")), read(absent)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swiglu_alpha": 1.5}, "swiglu_alpha=1.5 is not supported, only 1.702"),
        ({"experts_per_token": 2}, "experts_per_token=2 is not supported, only 4"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types has 'chunked_attention'"),
        ({"swiglu_limit": -1.0}, "swiglu_limit=-1.0 is no positive number"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64 is a field that is not supported"),
    ],
)
def test_what_cannot_be_computed_is_an_error_that_names_it(changes, message):
    with pytest.raises(Problems, match=message):
        read(released("gpt-oss-20b", **changes))


def test_a_model_without_sinks_is_not_published_as_gpt_oss():
    section = recipe("gpt-oss-20b")
    for block in section["blocks"].values():
        block["mixer"]["sinks"] = "none"
    with pytest.raises(CheckpointError, match="sinks: 'none' here, 'learned' there"):
        publish(section, "recipe")


def tiny_theirs() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers writes the folder")
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=2,
        vocab_size=48,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(torch.randn(weight.shape) * 0.2)
    return theirs.eval()


def quantised(folder: Path) -> nn.Module:
    """A folder with random experts in MXFP4, and the model of transformers that they stand for."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    theirs = tiny_theirs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
    state, weights = load_file(folder / "model.safetensors"), dict(theirs.named_parameters())
    for name in [each for each in state if each.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (experts, out, inner // 32), dtype=torch.uint8)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name].data = convert_moe_packed_tensors(blocks, scales).float()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def test_a_folder_with_experts_in_mxfp4_computes_what_transformers_computes(tmp_path):
    theirs = quantised(tmp_path)
    source = open_source(tmp_path)
    assert source.names["blocks.0.ffn.experts.gate"].dtype == "bfloat16"
    described = tiny(model=source.model)
    ours = build(described.model, described.objective.build()).to_empty(device="cpu").eval()
    ours.load_state_dict({name: source.read(name) for name in source.names})
    tokens = torch.randint(0, 48, (2, 19), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(19).expand(2, -1)
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = ours(tokens, Sequence(positions, torch.zeros_like(positions), torch.arange(2)))
    assert ((got - expected).norm() / expected.norm()).item() < 2e-5


def test_experts_in_mxfp4_that_are_not_all_there_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    quantised(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Problems, match=r"layers.1.mlp.experts.down_proj_blocks, and no \S+down_proj_scales"):
        open_source(tmp_path)
