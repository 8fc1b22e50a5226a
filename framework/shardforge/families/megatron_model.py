"""The model of a Megatron training, from its arguments.

Reference: megatron-core 0.16, TransformerConfig and MLATransformerConfig, as Megatron-LM's arguments fill them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shardforge.families.family import numbered
from shardforge.families.settings import Settings

NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm"}
LLAMA3 = {"original_length": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fixed there
REFUSED: tuple[str, ...] = (
    "heterogeneous_layers_config_path",
    "attention_output_gate",
    "apply_residual_connection_post_layernorm",
)
REFUSED += ("qk_l2_norm", "linear_attention_type", "experimental_attention_variant", "hybrid_override_pattern")
REFUSED += ("hybrid_layer_pattern", "is_hybrid_model", "moe_latent_size", "moe_apply_probs_on_input")
REFUSED += ("moe_expert_capacity_factor", "moe_router_force_load_balancing", "dsa_indexer_n_heads")
REFUSED += ("moe_router_topk_limited_devices",)
LOSSES = {"aux_loss": "sequence", "seq_aux_loss": "sequence", "global_aux_loss": "batch"}
SWITCHED_OFF = "none"
BALANCING = "moe_router_load_balancing_type"
INTERPOLATION = "rotary_seq_len_interpolation_factor"
BENT = ("glu_linear_offset", "activation_func_clamp_value")
CLAMPED = ("quick_geglu", *BENT)


def vocabulary(settings: Settings) -> tuple[int, int]:
    """Words of the model, and rows that its tables have there."""
    padded = settings.need("padded_vocab_size")
    told = settings.get("vocab_size")
    return (told if isinstance(told, int) and 1 < told < padded else padded), padded


def model(settings: Settings) -> dict[str, Any]:
    """The model section. Fields that it cannot mean are noted in `settings`."""
    settings.unknown(REFUSED, "not supported")
    layers, norm = settings.need("num_layers"), _norm(settings)
    embedding, position = _places(settings)
    latent = bool(settings.get("multi_latent_attention"))
    mixer = _latent(settings, norm) if latent else _grouped(settings, norm, position)
    residual = {"kind": "pre", "norm": norm, "dropout": float(settings.get("hidden_dropout", 0.1))}
    mixed = _mixed(settings, layers)
    ffns = {} if all(mixed) else {"dense": _dense(settings)}
    if any(mixed):
        ffns["moe"] = _moe(settings)
    blocks, names = {}, []
    for moe, near, free in zip(mixed, _near(settings, layers), _free(settings, layers), strict=True):
        kind = "moe" if moe else "dense"
        name = kind + ("" if near is None else "_near") + ("_free" if free else "")
        mine = mixer | ({} if near is None else {"mask": {"kind": "window", "size": near}})
        mine |= {"position": {"kind": "nope"}} if free else {}
        blocks[name] = {"mixer": mine, "ffn": ffns[kind], "residual": residual}
        names.append(name)
    told = numbered(settings, blocks, names)
    return {
        "vocab": vocabulary(settings)[0],
        "hidden": settings.need("hidden_size"),
        "embedding": embedding,
        **told,
        "norm": norm,
        "head": "linear" if settings.get("untie_embeddings_and_output_weights") else "tied",
        "dropout": float(settings.get("hidden_dropout", 0.1)),
        "init": {"std": settings.get("init_method_std", 0.02), "rule": "depth_scaled"},
        **_further(settings, names, norm),
    }


def _norm(settings: Settings) -> dict[str, Any]:
    eps = settings.get("norm_epsilon", settings.get("layernorm_epsilon", 1e-5))
    norm = {"kind": settings.choose("normalization", NORMS, "LayerNorm"), "eps": float(eps)}
    if settings.get("apply_layernorm_1p") or settings.get("layernorm_zero_centered_gamma"):
        if norm["kind"] == "layernorm":
            settings.wrong("apply_layernorm_1p=True with normalization='LayerNorm' is not supported, only 'RMSNorm'")
        norm["offset"] = 1.0
    return norm


def _grouped(settings: Settings, norm: dict[str, Any], position: dict[str, Any]) -> dict[str, Any]:
    heads, biased = settings.need("num_attention_heads"), bool(settings.get("add_bias_linear", True))
    sinks = settings.choose("softmax_type", {"vanilla": "none", "learnable": "learned"}, "vanilla")
    return {
        "kind": "gqa",
        "heads": heads,
        "kv_heads": settings.need("num_query_groups") if settings.get("group_query_attention", False) else heads,
        "head_dim": settings.get("kv_channels", max(1, settings.need("hidden_size") // heads)),
        "position": position,
        "qk_norm": norm if settings.get("qk_layernorm") else None,
        "bias": "all" if biased else "qkv" if settings.get("add_qkv_bias") else "none",
        "scale": settings.get("softmax_scale"),
        "sinks": sinks,
    }


def _latent(settings: Settings, norm: dict[str, Any]) -> dict[str, Any]:
    settings.only("add_bias_linear", False)
    settings.only("add_qkv_bias", False)
    settings.only("rotary_interleaved", False)
    settings.only("position_embedding_type", "rope")
    plain, turning = settings.get("qk_head_dim", 128), settings.get("qk_pos_emb_head_dim", 64)
    position: dict[str, Any] = {"kind": "rope", "base": _base(settings), "layout": "interleaved"}
    factor, weight = float(settings.get("rotary_scaling_factor", 40)), float(settings.get("mscale_all_dim", 0.0))
    mixer: dict[str, Any] = {}
    settings.only("rope_type", "rope", "yarn")
    if settings.get("rope_type", "yarn") == "yarn":
        mscale = float(settings.get("mscale", 1.0))
        position["scaling"] = {
            "kind": "yarn",
            "factor": factor,
            "original_length": settings.get("original_max_position_embeddings", 4096),
            "beta_fast": float(settings.get("beta_fast", 32)),
            "beta_slow": float(settings.get("beta_slow", 1)),
            **({} if (mscale, weight) == (1.0, 0.0) else {"mscale": mscale, "mscale_all_dim": weight}),
        }
    else:
        settings.only("rotary_percent", 1.0)
    if weight and "scaling" not in position:
        mixer["scale"] = (0.1 * weight * math.log(factor) + 1.0) ** 2 / math.sqrt(plain + turning)
    return {
        "kind": "mla",
        "heads": settings.need("num_attention_heads"),
        "q_lora_rank": settings.get("q_lora_rank"),
        "kv_lora_rank": settings.get("kv_lora_rank", 32),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": turning,
        "v_head_dim": settings.get("v_head_dim", 128),
        "position": position,
        "norm": norm if settings.get("qk_layernorm") else "none",
        **mixer,
    }


def _places(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The embedding and the position of attention."""
    settings.only("position_embedding_type", "rope", "yarn", "learned_absolute", "none")
    kind = settings.get("position_embedding_type", "learned_absolute")
    if kind == "learned_absolute":
        return {"kind": "learned", "length": settings.need("max_position_embeddings")}, {"kind": "nope"}
    if kind == "none":
        return {"kind": "token"}, {"kind": "nope"}
    rope: dict[str, Any] = {"kind": "rope", "base": _base(settings)}
    rope["fraction"] = float(settings.get("rotary_percent", 1.0))
    if settings.get("rotary_interleaved"):
        rope["layout"] = "interleaved"
    if kind == "yarn":
        settings.only("rotary_percent", 1.0)
        settings.only("rotary_interleaved", False)
        settings.only(INTERPOLATION, 1)
        return {"kind": "token"}, rope | {"scaling": _yarn(settings)}
    if factor := settings.get(INTERPOLATION):
        rope["scaling"] = {"kind": "linear", "factor": float(factor)}
    if settings.get("use_rope_scaling"):
        settings.only(INTERPOLATION, 1)  # there the one is applied after the other
        rope["scaling"] = {"kind": "llama3", "factor": float(settings.get("rope_scaling_factor", 8.0)), **LLAMA3}
    return {"kind": "token"}, rope


def _base(settings: Settings) -> float:
    return float(settings.get("rotary_base", 10000))


def _yarn(settings: Settings) -> dict[str, Any]:
    factor = float(settings.get("yarn_rotary_scaling_factor", 1.0))
    sharp = [settings.get(f"yarn_{name}") for name in ("mscale", "mscale_all_dim")]
    m, whole = (1.0 if weight is None else 0.1 * weight * math.log(factor) + 1.0 for weight in sharp)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_length": settings.need("yarn_original_max_position_embeddings"),
        "beta_fast": float(settings.get("yarn_beta_fast", 32.0)),
        "beta_slow": float(settings.get("yarn_beta_slow", 1.0)),
        "truncate": bool(settings.get("yarn_correction_range_round_to_int", True)),
        **({} if None in sharp else {"attention_factor": m / whole}),
    }


def _curve(settings: Settings) -> str:
    if settings.get("squared_relu"):
        return "relu2"
    fused = settings.get("bias_gelu_fusion") and settings.get("add_bias_linear", True)
    return "gelu_tanh" if fused or settings.get("openai_gelu") else "gelu"  # the fused kernel is the approximation


def _dense(settings: Settings) -> dict[str, Any]:
    inner = settings.get("ffn_hidden_size", 4 * settings.need("hidden_size"))
    told = {"inner": inner, "bias": bool(settings.get("add_bias_linear", True))}
    settings.only("quick_geglu", False)  # outside of a mixture
    gated = settings.get("swiglu", False)
    if gated:
        settings.unknown(BENT, "supported in mixtures alone")
    return {"kind": "glu", **told} if gated else {"kind": "mlp", "activation": _curve(settings), **told}


def _pattern(settings: Settings, key: str, layers: int, of: Any) -> list[bool]:
    """A list with an entry for each layer, or what `of` makes of a number."""
    told = settings.get(key)
    if isinstance(told, list | tuple):
        if len(told) != layers:
            settings.wrong(f"{key} has {len(told)} entries, num_layers is {layers}")
        return [bool(each) for each in [*told, *[False] * layers][:layers]]
    if told is not None and type(told) is not int:
        settings.wrong(f"{key}={told!r} is neither a number nor a list")
        told = None
    return [bool(of(layer, told)) for layer in range(layers)]


def _mixed(settings: Settings, layers: int) -> list[bool]:
    """Which layers are mixtures."""
    if not settings.get("num_experts"):
        return [False] * layers
    return _pattern(settings, "moe_layer_freq", layers, lambda layer, every: layer % (every or 1) == 0)


def _near(settings: Settings, layers: int) -> list[int | None]:
    """Keys that a layer sees at most, None for all."""
    window = settings.get("window_size")
    if not window:
        return [None] * layers
    if not isinstance(window, list | tuple) or len(window) != 2 or window[1] not in (0, -1):
        settings.wrong(f"window_size={window!r} is not supported, only (keys before, 0)")
        return [None] * layers
    if window[0] == -1:
        return [None] * layers
    chosen = _pattern(
        settings, "window_attn_skip_freq", layers, lambda layer, every: every is None or (layer + 1) % every
    )
    return [int(window[0]) + 1 if each else None for each in chosen]


def _free(settings: Settings, layers: int) -> list[bool]:
    """Layers without position."""
    return _pattern(settings, "no_rope_freq", layers, lambda layer, every: bool(every) and (layer + 1) % every == 0)


def _moe(settings: Settings) -> dict[str, Any]:
    gated = settings.get("swiglu", False) or settings.get("quick_geglu", False)
    biased = bool(settings.get("add_bias_linear", True))
    shared = settings.get("moe_shared_expert_intermediate_size")
    found = {
        "kind": "moe",
        "experts": settings.need("num_experts"),
        "k": settings.get("moe_router_topk", 2),
        "inner": settings.get("moe_ffn_hidden_size") or settings.need("ffn_hidden_size"),
        "form": "glu" if gated else "mlp",
        "activation": "silu" if gated else _curve(settings),
        "bias": biased,
        "router": _router(settings, biased),
        "shared_gate": "sigmoid" if shared and settings.get("moe_shared_expert_gate") else "none",
        "z_loss": float(settings.get("moe_z_loss_coeff", 0.0)),
        "balance": _balance(settings),
    }
    if shared:
        found["shared"] = {**_dense(settings), "inner": shared}
    if any(settings.get(key) for key in CLAMPED):
        settings.only("quick_geglu", True)
        settings.only("glu_linear_offset", 1.0)
        found["clamp"] = float(settings.get("activation_func_clamp_value", 0.0)) or None
    return found


def _router(settings: Settings, biased: bool) -> dict[str, Any]:
    k = settings.get("moe_router_topk", 2)
    settings.only("moe_router_score_function", "softmax", "sigmoid")
    router: dict[str, Any] = {"kind": "topk", "bias": biased}
    if settings.get("moe_router_score_function", "softmax") == "sigmoid":
        router |= {"score": "sigmoid", "weights": "raw" if k == 1 else "renormalized"}
        if settings.get("moe_router_enable_expert_bias"):
            router["selection_bias"] = {"rate": float(settings.get("moe_router_bias_update_rate", 1e-3))}
    elif settings.get("moe_router_pre_softmax"):
        router["weights"] = "raw"
    else:
        router["order"] = "topk_first"
    if settings.get("moe_router_group_topk"):
        router |= {"groups": settings.need("moe_router_num_groups")}
        router |= {"group_topk": settings.need("moe_router_group_topk")}
    return router | {
        "scale": float(settings.get("moe_router_topk_scaling_factor") or 1.0),
        "jitter": float(settings.get("moe_input_jitter_eps") or 0.0),
    }


def _balance(settings: Settings) -> list[dict[str, Any]]:
    told, weights = settings.get(BALANCING) or "aux_loss", settings.get("moe_aux_loss_coeff")
    kinds = list(told) if isinstance(told, list | tuple) else [told]
    if odd := [kind for kind in kinds if kind != SWITCHED_OFF and kind not in LOSSES]:
        settings.wrong(f"{BALANCING}={told!r}: {', '.join(map(repr, odd))} is not supported, only {', '.join(LOSSES)}")
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(kinds)
    if len(weights) != len(kinds):
        settings.wrong(f"moe_aux_loss_coeff={weights!r} are not as many as {BALANCING}={told!r}")
    rows = settings.get("micro_batch_size", 1)
    found: dict[str, dict[str, Any]] = {}
    for kind, weight in zip(kinds, weights, strict=False):
        if kind in LOSSES and weight:
            pool = {"sequences": rows} if kind == "aux_loss" and rows > 1 else {}
            found.setdefault(LOSSES[kind], {"scope": LOSSES[kind], "weight": float(weight), **pool})
    return list(found.values())


def _further(settings: Settings, names: list[str], norm: Mapping[str, Any]) -> dict[str, Any]:
    depth = settings.get("mtp_num_layers")
    if not depth or not names:
        return {}
    told = {"depth": depth, "block": names[-1], "concat": "embed_first", "hidden": "after_norm", "norm": dict(norm)}
    return {"mtp": told | {"weight": float(settings.get("mtp_loss_scaling_factor", 0.1))}}
