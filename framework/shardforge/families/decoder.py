"""What the families that descend from Llama share: one settings reader, one table of names."""

from __future__ import annotations

from typing import Any

from shardforge.families.family import ACTIVATIONS, masked, rope
from shardforge.families.settings import Settings
from shardforge.families.table import layers

TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
ATTENTION = {
    "mixer.q": "self_attn.q_proj",
    "mixer.k": "self_attn.k_proj",
    "mixer.v": "self_attn.v_proj",
    "mixer.out": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm",
    "mixer.k_norm": "self_attn.k_norm",
}
GLU = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
PRE = {"mixer_residual.norm": "input_layernorm", "ffn_residual.norm": "post_attention_layernorm"}
RES_POST = {
    "mixer_residual.norm": "post_attention_layernorm",
    "ffn_residual.norm": "post_feedforward_layernorm",
}
SPARE = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"model\.rotary_emb\.inv_freq")


def names(norms: dict[str, str]) -> dict[str, str]:
    """Module names of ours and theirs; a family without biases or norms on queries has fewer of them."""
    return TOP | layers("blocks.{layer}", "model.layers.{layer}", ATTENTION | GLU | norms)


def model(
    settings: Settings,
    *,
    residual: str = "pre",
    bias: str = "none",
    qk_norm: str | None = None,
    kv_heads: int | None = None,
    eps: float | None = None,
    windowed: bool = False,
) -> dict[str, Any]:
    """The model section. `bias` of the attention where the settings have no say; `qk_norm` over "head" or "all";
    `kv_heads` and `eps` are the family's own defaults, None where the settings must say; `windowed` alike."""
    hidden, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    eps = settings.get("rms_norm_eps", eps)
    if eps is None:
        settings.wrong("rms_norm_eps is missing")
    norm = {"kind": "rmsnorm", "eps": float(eps or 1e-6)}
    if settings.get("head_dim") is None and hidden % heads:
        settings.wrong(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, and there is no head_dim")
    mixer = {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads", kv_heads) or settings.need("num_key_value_heads"),
        "head_dim": settings.get("head_dim", max(1, hidden // heads)),
        "position": rope(settings),
        "bias": "all" if settings.get("attention_bias", False) else bias,
    }
    if qk_norm is not None:
        mixer |= {"qk_norm": norm, "qk_norm_over": qk_norm}
    ffn = {
        "kind": "glu",
        "inner": settings.need("intermediate_size"),
        "activation": settings.choose("hidden_act", ACTIVATIONS, "silu"),
        "bias": bool(settings.get("mlp_bias", False)),
    }
    block = {"ffn": ffn, "residual": {"kind": residual, "norm": norm}}
    return {
        "vocab": settings.need("vocab_size"),
        "hidden": hidden,
        **masked(settings, mixer, block, settings.need("num_hidden_layers"), windowed),
        "norm": norm,
        "head": "tied" if settings.get("tie_word_embeddings", False) else "linear",
        "init": {"std": settings.get("initializer_range", 0.02)},
    }
