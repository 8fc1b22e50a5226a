"""The config.json of models as they were released, which have more fields than a class of transformers knows."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shardforge.checkpoint import state
from shardforge.families.huggingface import family_of
from shardforge.families.publish import publish
from shardforge.families.section import apart, config, whole
from shardforge.families.settings import Settings
from shardforge.model.build import build
from shardforge.recipe.load import load_model
from shardforge.recipe.provenance import plain

IDLE = re.compile(r"\w+_token_id|\w+_pdrop|router_aux_loss_coef|sliding_window|max_position_embeddings")
"""Fields that a model section does not keep: none of these models computes by them."""
RECIPES = Path(__file__).parents[3] / "recipes" / "models"
ALIKE = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "use_cache": True,
}
LLAMA = ALIKE | {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
}
MIXTRAL = ALIKE | {
    **{"architectures": ["MixtralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096},
    **{"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral"},
    **{"num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8},
    **{"num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0},
    **{"router_aux_loss_coef": 0.02, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
}
SHIPPED: dict[str, dict[str, Any]] = {
    "llama3-8b": LLAMA
    | {
        **{"bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096, "intermediate_size": 14336},
        **{"max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256},
    },
    "llm-jp-3-1.8b": LLAMA
    | {
        **{"bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 7168},
        **{"max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
        **{"num_key_value_heads": 16, "rope_theta": 10000, "vocab_size": 99584},
    },
    "gpt2-124m": {
        **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
        **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
        **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12},
        **{"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None},
        **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"},
        **{"summary_use_proj": True, "vocab_size": 50257},
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "olmo2-7b": ALIKE
    | {
        **{"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "eos_token_id": 100257},
        **{"hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "olmo2"},
        **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277},
        **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
        "vocab_size": 100352,
    },
    "qwen2.5-72b": ALIKE
    | {
        **{"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643},
        **{"hidden_size": 8192, "intermediate_size": 29568, "max_position_embeddings": 131072},
        **{"max_window_layers": 80, "model_type": "qwen2", "num_attention_heads": 64, "num_hidden_layers": 80},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": 131072},
        **{"tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064},
    },
    "mixtral-8x7b": MIXTRAL,
    "llm-jp-3-8x1.8b": MIXTRAL
    | {
        **{"attention_bias": False, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 7168},
        **{"max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
        **{"num_key_value_heads": 16, "rope_theta": 10000, "router_jitter_noise": 0.0, "vocab_size": 99584},
    },
    "qwen3-30b-a3b": ALIKE
    | {
        **{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643},
        **{"decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048},
        **{"intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48},
        **{"mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48},
        **{"num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None},
        **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None},
        **{"tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
    },
}
COUNTED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama 3.2 1B": (
        1_235_814_400,
        LLAMA
        | {
            **{"bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048},
            **{"intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32},
            **{"num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256},
            "rope_scaling": {
                **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"},
                "original_max_position_embeddings": 8192,
            },
            "tie_word_embeddings": True,
        },
    ),
    "SmolLM2 135M": (
        134_515_008,
        LLAMA
        | {
            **{"bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.041666666666666664},
            **{"intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192},
            **{"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3},
            **{"rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152},
        },
    ),
    "Mistral 7B v0.1": (
        7_241_732_096,
        ALIKE
        | {
            **{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096},
            **{"intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral"},
            **{"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8},
            **{"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False},
            "vocab_size": 32000,
        },
    ),
    "OLMoE 1B 7B": (
        6_919_161_856,
        ALIKE
        | {
            **{"architectures": ["OlmoeForCausalLM"], "attention_bias": False, "clip_qkv": None},
            **{"eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "model_type": "olmoe"},
            **{"max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16},
            **{"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16},
            **{"output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05, "rope_scaling": None},
            **{"rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False},
            "vocab_size": 50304,
        },
    ),
    "SmolLM3 3B": (
        3_075_098_624,
        ALIKE
        | {
            **{"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "bos_token_id": None},
            **{"eos_token_id": 128012, "hidden_size": 2048, "intermediate_size": 11008, "model_type": "smollm3"},
            **{"layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28},
            **{"mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9},
            **{"num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4},
            **{"pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None},
            **{"rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
        },
    ),
}


def read(told: dict[str, Any]) -> dict[str, Any]:
    settings = Settings(told, Path("config.json"))
    section = family_of(settings).model(settings)
    settings.settle()
    return whole(section, "config.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_released_model_is_the_recipe_that_is_shipped_for_it(name):
    assert apart(read(SHIPPED[name]), plain(load_model(RECIPES / f"{name}.yaml").recipe.model)) == []


@pytest.mark.parametrize("name", COUNTED)
def test_a_released_model_has_as_many_weights_as_its_release(name):
    count, told = COUNTED[name]
    table = state.table(build(config(read(told), name), nn.Identity()))
    assert sum(math.prod(each["shape"]) for each in table.values()) == count


@pytest.mark.parametrize("told", [*SHIPPED.values(), *(told for _, told in COUNTED.values())], ids=[*SHIPPED, *COUNTED])
def test_what_is_written_of_a_released_model_is_what_was_released(told):
    written = publish(read(told), "the release").config
    other = {key: (value, told[key]) for key, value in written.items() if key in told and value != told[key]}
    assert not {key: pair for key, pair in other.items() if not IDLE.fullmatch(key)}
