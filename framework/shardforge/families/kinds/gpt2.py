"""GPT-2: learned positions, biases everywhere, and matrices stored as [in, out] with q, k and v side by side.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
Limits: its dropout of 0.1 belongs to a training, not to the weights, and is left to the recipe.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import ACTIVATIONS, Family, numbered
from shardforge.families.forms import SIDE_BY_SIDE, TURNED
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings
from shardforge.families.table import Row, layers, rows

TOP = {"embed": "transformer.wte", "embed.places": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
NORMS = {"mixer_residual.norm": "ln_1", "ffn_residual.norm": "ln_2"}
MATRICES = {"mixer.out": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
OURS, THEIRS = "blocks.{layer}", "transformer.h.{layer}"


def model(settings: Settings) -> dict[str, Any]:
    hidden, heads, depth = settings.need("n_embd"), settings.need("n_head"), decoder.depth(settings, "n_layer")
    settings.only("scale_attn_weights", True)
    settings.only("scale_attn_by_inverse_layer_idx", False)
    settings.only("add_cross_attention", False)
    if hidden % heads:
        settings.wrong(f"n_embd={hidden} is no multiple of n_head={heads}")
    norm = {"kind": "layernorm", "eps": settings.get("layer_norm_epsilon", 1e-5)}
    block = {
        "mixer": {
            "kind": "gqa",
            "heads": heads,
            "head_dim": max(1, hidden // heads),
            "position": "nope",
            "bias": "all",
        },
        "ffn": {
            "kind": "mlp",
            "inner": settings.get("n_inner", 4 * hidden),
            "activation": settings.choose("activation_function", ACTIVATIONS, "gelu_new"),
            "bias": True,
        },
        "residual": {"kind": "pre", "norm": norm},
    }
    return {
        "vocab": settings.need("vocab_size"),
        "hidden": hidden,
        "embedding": {"kind": "learned", "length": settings.need("n_positions")},
        **numbered(settings, {"dense": block}, ["dense"] * depth),
        "norm": norm,
        "head": "tied" if settings.get("tie_word_embeddings", True) else "linear",
        "init": {"std": settings.get("initializer_range", 0.02), "rule": "depth_scaled"},
    }


def config(section: dict[str, Any]) -> dict[str, Any]:
    blocks = blocks_of(section)
    mixer, ffn = blocks[0]["mixer"], blocks[0]["ffn"]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": section["vocab"],
        "n_positions": section["embedding"]["length"],
        "n_embd": section["hidden"],
        "n_layer": len(blocks),
        "n_head": mixer["heads"],
        "n_inner": ffn["inner"],
        "activation_function": {"gelu_tanh": "gelu_new"}.get(ffn["activation"], ffn["activation"]),
        "layer_norm_epsilon": section["norm"]["eps"],
        "initializer_range": section["init"]["std"],
        "tie_word_embeddings": section["head"]["kind"] == "tied",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


FUSED = Row(tuple(f"{OURS}.mixer.{role}.{{leaf}}" for role in "qkv"), (f"{THEIRS}.attn.c_attn.{{leaf}}",), SIDE_BY_SIDE)
FAMILY = Family(
    architectures=("GPT2LMHeadModel",),
    model=model,
    config=config,
    table=lambda _: (*rows(TOP | layers(OURS, THEIRS, NORMS)), *rows(layers(OURS, THEIRS, MATRICES), TURNED), FUSED),
    tied="lm_head.weight",
    spare=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
    optional="transformer.",
)
