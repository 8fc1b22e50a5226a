"""What Gemma 2 and 3 share: norms on both sides of a branch with gains around zero, scaled embeddings, soft caps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardforge.families import decoder
from shardforge.families.family import ACTIVATIONS, numbered
from shardforge.families.section import layers as blocks_of
from shardforge.families.section import tied
from shardforge.families.settings import Settings
from shardforge.families.table import Row, rows

NORMS = {
    "mixer_residual.norm": "input_layernorm",
    "mixer_residual.norm_out": "post_attention_layernorm",
    "ffn_residual.norm": "pre_feedforward_layernorm",
    "ffn_residual.norm_out": "post_feedforward_layernorm",
}
TABLE: tuple[Row, ...] = rows(decoder.names(NORMS) | {"head.inner": "lm_head"})
WINDOW, GROUPS, WIDTH, SCALAR, LOGITS, ACTIVATION = 4096, 4, 256, 256.0, 30.0, "gelu_pytorch_tanh"
"""What the architecture takes where the settings have no say."""


def norm(settings: Settings) -> dict[str, Any]:
    """Its gain is stored less one."""
    return decoder.norm(settings, 1e-6) | {"offset": 1.0}


def attention(settings: Settings, **more: Any) -> dict[str, Any]:
    """Attention whose factor on the scores is told by the settings; `more` as for `decoder.attention`."""
    hidden, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    if hidden % heads:
        settings.wrong(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, as it must be for Gemma")
    settings.unknown(["use_bidirectional_attention"], "only causal attention is supported")
    scalar = settings.positive("query_pre_attn_scalar", SCALAR)
    bias = decoder.biases(settings)
    mixer = decoder.attention(settings, bias=bias, kv_heads=GROUPS, head_dim=WIDTH, **more)
    return mixer | {"scale": scalar**-0.5}


def cap(settings: Settings, key: str, usual: float | None) -> float | None:
    """A bound; null is none, and `usual` stands where the settings have no say."""
    return None if settings.given(key, usual) is None else settings.positive(key, usual or LOGITS)


def model(
    settings: Settings, mixers: dict[str, dict[str, Any]], stack: Sequence[str], head_cap: float | None
) -> dict[str, Any]:
    """The model section, of layers that differ in their mixers: `stack` names one of `mixers` for each layer."""
    usual, hidden = norm(settings), settings.need("hidden_size")
    settings.only("hidden_act", settings.get("hidden_activation", ACTIVATION))  # which is not the one that counts
    ffn = {
        "kind": "glu",
        "inner": settings.need("intermediate_size"),
        "activation": settings.choose("hidden_activation", ACTIVATIONS, ACTIVATION),
    }
    blocks = {
        name: {"mixer": mixer, "ffn": ffn, "residual": {"kind": "sandwich", "norm": usual}}
        for name, mixer in mixers.items()
    }
    head: Any = "tied" if settings.get("tie_word_embeddings", True) else "linear"
    return {
        "vocab": settings.need("vocab_size"),
        "hidden": hidden,
        "embedding": {"kind": "token", "scale": hidden**0.5},
        **numbered(settings, blocks, list(stack)),
        "norm": usual,
        "head": head if head_cap is None else {"kind": "softcap", "cap": head_cap, "head": head},
        "init": {"std": settings.get("initializer_range", 0.02)},
    }


def config(section: dict[str, Any], architecture: str, model_type: str) -> dict[str, Any]:
    """config.json of a whole model section but for positions and the cap on scores, as far as Gemma 2 and 3 agree."""
    blocks = blocks_of(section)
    mixer, ffn, head = blocks[0]["mixer"], blocks[0]["ffn"], section["head"]
    seen = decoder.sizes(section)
    return decoder.config(section, architecture, model_type) | {
        "intermediate_size": ffn["inner"],
        "hidden_activation": decoder.WORDS[ffn["activation"]],
        "query_pre_attn_scalar": round((mixer["scale"] or mixer["head_dim"] ** -0.5) ** -2),
        "tie_word_embeddings": tied(section),
        "final_logit_softcapping": head["cap"] if head["kind"] == "softcap" else None,
        "sliding_window": next((size for size in seen if size is not None), WINDOW),
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in seen],
    }
