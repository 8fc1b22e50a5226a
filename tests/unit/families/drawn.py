"""Random settings of every family, as config.json would have them: sizes that share nothing, and switches."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

FEW = st.integers(1, 3)
FLAG = st.booleans()
CAP = st.none() | st.just(2.5)


def _sizes(draw: st.DrawFn) -> dict[str, Any]:
    """What all descendants of Llama have."""
    kv, layers, wide = draw(FEW), draw(FEW), draw(FEW)
    heads = kv * draw(FEW)
    return {
        "hidden_size": heads * wide * 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 2 * draw(FEW),
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(2, 9)),
        "intermediate_size": draw(st.integers(1, 7)),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": draw(FLAG),
    }


def _experts(draw: st.DrawFn, count: str) -> dict[str, Any]:
    experts = draw(st.integers(1, 5))
    return {count: experts, "num_experts_per_tok": draw(st.integers(1, experts))}


def _gpt2(draw: st.DrawFn) -> dict[str, Any]:
    heads = draw(FEW)
    return {
        "n_embd": heads * draw(FEW),
        "n_head": heads,
        "n_layer": draw(FEW),
        "n_positions": draw(FEW),
        "vocab_size": draw(st.integers(2, 9)),
        "n_inner": draw(st.none() | st.integers(1, 7)),
        "tie_word_embeddings": draw(FLAG),
    }


def _deepseek(draw: st.DrawFn) -> dict[str, Any]:
    sizes = _sizes(draw)
    del sizes["head_dim"]
    experts = draw(st.integers(1, 5))
    return sizes | {
        "num_key_value_heads": sizes["num_attention_heads"],
        "q_lora_rank": draw(st.none() | FEW),
        **{name: draw(FEW) for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "qk_rope_head_dim": 2 * draw(FEW),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "n_shared_experts": draw(FEW),
        "moe_intermediate_size": draw(FEW),
        "first_k_dense_replace": draw(st.integers(0, sizes["num_hidden_layers"])),
        **{"n_group": 1, "topk_group": 1},
    }


def _switches(draw: st.DrawFn, architecture: str, layers: int) -> dict[str, Any]:
    """What one architecture has and the others lack."""
    turning = st.lists(st.integers(0, 1), min_size=layers, max_size=layers)
    biases, summed = {"attention_bias": draw(FLAG)}, {"norm_topk_prob": draw(FLAG)}
    inner = {"moe_intermediate_size": draw(FEW)}
    capped = {"final_logit_softcapping": draw(CAP)}
    some = {"mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=2, unique=True))}
    return {
        "LlamaForCausalLM": biases | {"mlp_bias": draw(FLAG)},
        "MistralForCausalLM": {"sliding_window": draw(st.none() | FEW)},
        "Qwen2ForCausalLM": {"use_sliding_window": draw(FLAG), "max_window_layers": draw(FEW)},
        "Qwen3ForCausalLM": biases,
        "Olmo2ForCausalLM": biases,
        "SmolLM3ForCausalLM": biases | {"mlp_bias": draw(FLAG), "no_rope_layers": draw(turning)},
        "MixtralForCausalLM": _experts(draw, "num_local_experts"),
        "Qwen3MoeForCausalLM": _experts(draw, "num_experts") | biases | summed | inner | some,
        "OlmoeForCausalLM": _experts(draw, "num_experts") | biases | summed | {"head_dim": None},
        "Gemma2ForCausalLM": biases | capped | {"attn_logit_softcapping": draw(CAP)},
        "Gemma3ForCausalLM": biases | capped | {"sliding_window_pattern": draw(FEW)},
        "GptOssForCausalLM": _experts(draw, "num_local_experts") | biases,
    }[architecture]


@st.composite
def settings(draw: st.DrawFn, architecture: str) -> dict[str, Any]:
    """A config.json of this architecture. KeyError for one that has no entry here yet."""
    named = {"architectures": [architecture]}
    if architecture == "GPT2LMHeadModel":
        return named | _gpt2(draw)
    if architecture == "DeepseekV2ForCausalLM":
        return named | _deepseek(draw)
    if architecture == "DeepseekV3ForCausalLM":
        return named | _deepseek(draw) | {"num_nextn_predict_layers": draw(st.integers(0, 2))}
    sizes = _sizes(draw)
    if architecture == "Gemma3ForConditionalGeneration":
        return named | {"text_config": sizes | _switches(draw, "Gemma3ForCausalLM", sizes["num_hidden_layers"])}
    return named | sizes | _switches(draw, architecture, sizes["num_hidden_layers"])
