"""Llama and what descends from it, dense and with experts, and GPT-2."""

from __future__ import annotations

from typing import Any

from tests.parity.family_cases import Case

SHARED = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}
GPT2 = {
    **{"n_embd": 24, "n_head": 3, "n_layer": 3, "vocab_size": 48, "n_positions": 64, "n_inner": 40},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
    "attn_implementation": "eager",
}
ODD = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
NEAR = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MIXTURE = {"num_experts_per_tok": 3, "experts_implementation": "eager"}
ROUTED = MIXTURE | {"num_experts": 7}
QWEN = ROUTED | {"moe_intermediate_size": 20, "head_dim": 8}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0},
    "yarn, told all": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0},
        **{"beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
    },
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    },
}


def of(name: str, shared: dict[str, Any] = SHARED, **more: Any) -> Case:
    """A case of the transformers config class of that name."""

    def config() -> Any:
        import transformers

        return getattr(transformers, name)(**shared | more)

    return Case(config)


def turned(kind: str) -> Case:
    """Llama with scaled positions, in sequences longer than the length that its weights were made for."""
    return of("LlamaConfig", max_position_embeddings=16, rope_parameters=ROPES[kind] | {"rope_theta": 500.0})


CASES: dict[str, Case] = {
    "llama": of("LlamaConfig", head_dim=8),
    "llama, tied, biases": of("LlamaConfig", **TIED, **BIASED, mlp_bias=True),
    "llama, odd heads": of("LlamaConfig", **ODD, rope_parameters={"rope_type": "default", "rope_theta": 77.0}),
    **{f"llama, {kind} positions": turned(kind) for kind in ROPES},
    "mistral": of("MistralConfig", sliding_window=None),
    "mistral, window": of("MistralConfig", head_dim=8, sliding_window=5, hidden_act="gelu"),
    "qwen2": of("Qwen2Config"),
    "qwen2, tied, windows from layer 1": of("Qwen2Config", **TIED, **NEAR),
    "qwen3, odd heads": of("Qwen3Config", **ODD | {"hidden_size": 23}),
    "qwen3, tied, biases, windows from layer 1": of("Qwen3Config", **TIED, **BIASED, **NEAR, head_dim=8),
    "olmo2": of("Olmo2Config"),
    "olmo2, tied, biases, wide heads": of("Olmo2Config", **TIED, **BIASED, head_dim=8),
    "smollm3": of("SmolLM3Config", num_hidden_layers=5, head_dim=8),
    "smollm3, untied, biases, told layers": of(
        "SmolLM3Config",
        **{"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
        **{"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 4},
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "mixtral": of("MixtralConfig", **MIXTURE, num_local_experts=7),
    "mixtral, tied, window": of("MixtralConfig", **MIXTURE, **TIED, num_local_experts=4, sliding_window=5, head_dim=8),
    "mixtral, charged": of(
        "MixtralConfig", **MIXTURE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.02
    ),
    "qwen3-moe, weights as they are": of("Qwen3MoeConfig", **QWEN),
    "qwen3-moe, a dense layer, tied, biases": of(
        "Qwen3MoeConfig", **QWEN, **TIED, **BIASED, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "qwen3-moe, every second layer, window": of(
        "Qwen3MoeConfig", **QWEN, decoder_sparse_step=2, use_sliding_window=True, sliding_window=4
    ),
    "olmoe": of("OlmoeConfig", **ROUTED),
    "olmoe, tied, biases, renormalized": of("OlmoeConfig", **ROUTED, **TIED, **BIASED, norm_topk_prob=True),
    "gpt2": of("GPT2Config", GPT2),
    "gpt2, untied, no inner": of("GPT2Config", GPT2, tie_word_embeddings=False, n_inner=None),
}
