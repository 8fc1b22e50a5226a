"""Dense GPT models of Megatron-LM and megatron-core as a source of weights.

Reference: megatron-core 0.16, GPTModel with a local or a Transformer Engine layer, whose names this follows.
Limits: no experts, latent attention, windows, zero-centred norms; layers of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardforge.core.errors import CheckpointError
from shardforge.families.forms import QueryGroups, Rows
from shardforge.families.linked import LinkedSource
from shardforge.families.megatron_files import METADATA, DistFolder, LegacyFolder
from shardforge.families.settings import Settings
from shardforge.families.table import Row, layers, rows

NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
TOP = {
    "embed": "embedding.word_embeddings",
    "embed.places": "embedding.position_embeddings",
    "norm": "decoder.final_layernorm",
    "head": "output_layer",
}
ROLES = {
    "mixer.out": "self_attention.linear_proj",
    "mixer.q_norm": "self_attention.q_layernorm",
    "mixer.k_norm": "self_attention.k_layernorm",
    "ffn.down": "mlp.linear_fc2",
}
OURS, THEIRS = "blocks.{layer}", "decoder.layers.{layer}"
LLAMA3 = {"original_length": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fixed there
REFUSED = ("num_experts", "multi_latent_attention", "apply_layernorm_1p", "window_size", "mtp_num_layers")
REFUSED += ("heterogeneous_layers_config_path", "attention_output_gate", "apply_residual_connection_post_layernorm")


class MegatronSource(LinkedSource):
    """See `families.source.Source`. `path` is the folder of one iteration, in either of Megatron's formats."""

    def __init__(self, path: Path):
        files = DistFolder(path) if (path / METADATA).is_file() else LegacyFolder(path)
        if files.settings is None:
            raise CheckpointError(
                "the checkpoint does not hold the arguments that it was trained with ('args'), so its model is unknown",
                path,
                "save it with Megatron-LM's training script, which puts them in",
            )
        settings = Settings(vars(files.settings), path)
        found = model(settings)
        settings.settle()
        spare = [r"output_layer\.weight"] if found["head"] == "tied" else []
        super().__init__(files, found, table(found), origin=path, spare=spare)


def model(settings: Settings) -> dict[str, Any]:
    """The model section from the arguments of a training."""
    settings.unknown(REFUSED, "not supported")
    hidden, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    eps = settings.get("norm_epsilon", settings.get("layernorm_epsilon", 1e-5))
    norm = {"kind": settings.choose("normalization", NORMS, "LayerNorm"), "eps": float(eps)}
    biased = bool(settings.get("add_bias_linear", True))
    grouped = settings.get("group_query_attention", False)
    embedding, position = _places(settings)
    mixer = {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": settings.need("num_query_groups") if grouped else heads,
        "head_dim": settings.get("kv_channels", max(1, hidden // heads)),
        "position": position,
        "qk_norm": norm if settings.get("qk_layernorm") else None,
        "bias": "all" if biased else "qkv" if settings.get("add_qkv_bias") else "none",
    }
    inner = {"inner": settings.get("ffn_hidden_size", 4 * hidden), "bias": biased}
    gated = settings.get("swiglu", False)
    ffn = {"kind": "glu", **inner} if gated else {"kind": "mlp", "activation": _curve(settings), **inner}
    block = {"mixer": mixer, "ffn": ffn, "residual": {"kind": "pre", "norm": norm}}
    return {
        "vocab": settings.need("padded_vocab_size"),
        "hidden": hidden,
        "embedding": embedding,
        "blocks": {"dense": block},
        "stack": [f"dense x {settings.need('num_layers')}"],
        "norm": norm,
        "head": "linear" if settings.get("untie_embeddings_and_output_weights") else "tied",
        "init": {"std": settings.get("init_method_std", 0.02), "rule": "depth_scaled"},
    }


def _curve(settings: Settings) -> str:
    if settings.get("squared_relu"):
        return "relu2"
    fused = settings.get("bias_gelu_fusion") and settings.get("add_bias_linear", True)
    return "gelu_tanh" if fused or settings.get("openai_gelu") else "gelu"  # the fused kernel is the approximation


def _places(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The embedding and the position of attention."""
    settings.only("position_embedding_type", "rope", "learned_absolute", "none")
    kind = settings.get("position_embedding_type", "learned_absolute")
    if kind == "learned_absolute":
        return {"kind": "learned", "length": settings.need("max_position_embeddings")}, {"kind": "nope"}
    if kind == "none":
        return {"kind": "token"}, {"kind": "nope"}
    rope = {
        "kind": "rope",
        "base": float(settings.get("rotary_base", 10000)),
        "fraction": float(settings.get("rotary_percent", 1.0)),
    }
    if settings.get("rotary_interleaved"):
        rope["layout"] = "interleaved"
    if factor := settings.get("rotary_seq_len_interpolation_factor"):
        rope["scaling"] = {"kind": "linear", "factor": float(factor)}
    if settings.get("use_rope_scaling"):
        rope["scaling"] = {"kind": "llama3", "factor": float(settings.get("rope_scaling_factor", 8.0)), **LLAMA3}
    return {"kind": "token"}, rope


def table(model: Mapping[str, Any]) -> tuple[Row, ...]:
    """Where the weights of a model section lie. Norms stand with the matmul behind them (megatron_files.LOCAL)."""
    block = model["blocks"]["dense"]
    mixer = block["mixer"]
    fused = tuple(f"{OURS}.mixer.{role}.{{leaf}}" for role in "qkv")
    into = ("gate", "up") if block["ffn"]["kind"] == "glu" else ("up",)
    qkv, fc1 = f"{THEIRS}.self_attention.linear_qkv", f"{THEIRS}.mlp.linear_fc1"
    return (
        *rows(TOP | layers(OURS, THEIRS, ROLES)),
        Row((f"{OURS}.mixer_residual.norm.{{leaf}}",), (f"{qkv}.layer_norm_{{leaf}}",)),
        Row((f"{OURS}.ffn_residual.norm.{{leaf}}",), (f"{fc1}.layer_norm_{{leaf}}",)),
        Row(fused, (f"{qkv}.{{leaf}}",), QueryGroups(mixer["kv_heads"], mixer["head_dim"])),
        Row(tuple(f"{OURS}.ffn.{role}.{{leaf}}" for role in into), (f"{fc1}.{{leaf}}",), Rows(len(into))),
    )
