"""Published models, tiny and random: the transformers config, our recipe for it, and where its weights go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

H, F, N, M, D, L, V = 24, 40, 4, 2, 8, 3, 48
"""hidden, ffn, heads, kv heads, head width, layers, vocabulary."""

SHARED = {
    "hidden_size": H,
    "intermediate_size": F,
    "num_attention_heads": N,
    "num_key_value_heads": M,
    "num_hidden_layers": L,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
NORM = {"kind": "rmsnorm", "eps": 1e-5}
ATTENTION = {"kind": "gqa", "heads": N, "kv_heads": M, "head_dim": D, "position": {"kind": "rope", "base": 10000.0}}
GLU = {"kind": "glu", "inner": F}
ROLES = {
    "self_attn.q_proj": "mixer.q",
    "self_attn.k_proj": "mixer.k",
    "self_attn.v_proj": "mixer.v",
    "self_attn.o_proj": "mixer.out",
    "self_attn.q_norm": "mixer.q_norm",
    "self_attn.k_norm": "mixer.k_norm",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}
PRE = {"input_layernorm": "mixer_residual.norm", "post_attention_layernorm": "ffn_residual.norm"}
RES_POST = {"post_attention_layernorm": "mixer_residual.norm", "post_feedforward_layernorm": "ffn_residual.norm"}
SANDWICH = {
    "input_layernorm": "mixer_residual.norm",
    "post_attention_layernorm": "mixer_residual.norm_out",
    "pre_feedforward_layernorm": "ffn_residual.norm",
    "post_feedforward_layernorm": "ffn_residual.norm_out",
}


@dataclass(frozen=True)
class Published:
    config: Callable[[], Any]  # a transformers config
    model: dict[str, Any]  # our model section
    rename: Callable[[str], str | None]  # their weight name -> ours; None for a tied copy
    split: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state


def llama_names(norms: dict[str, str], tied: bool = False) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        name = name.removeprefix("model.")
        if name == "lm_head.weight":
            return None if tied else "head.weight"
        if name in ("embed_tokens.weight", "norm.weight"):
            return name.replace("embed_tokens", "embed")
        _, layer, *middle, last = name.split(".")
        return f"blocks.{layer}.{(ROLES | norms)['.'.join(middle)]}.{last}"

    return rename


def model(mixers: list[dict], ffn: dict, residual: dict, **rest: Any) -> dict[str, Any]:
    """A model section whose layers differ in their mixers only; they are blocks b0, b1, ..."""
    blocks = {f"b{i}": {"mixer": m, "ffn": ffn, "residual": residual} for i, m in enumerate(mixers)}
    base = {"vocab": V, "hidden": H, "blocks": blocks, "stack": list(blocks), "norm": NORM, "core": "eager"}
    return base | rest


def llama(rope: dict[str, Any] | None = None) -> Published:
    from transformers import LlamaConfig

    return Published(
        lambda: LlamaConfig(**SHARED, head_dim=D, rope_parameters=rope or PLAIN),
        model([ATTENTION | {"position": position(rope)}] * L, GLU, {"kind": "pre", "norm": NORM}),
        llama_names(PRE),
    )


def qwen3() -> Published:
    from transformers import Qwen3Config

    return Published(
        lambda: Qwen3Config(**SHARED, head_dim=D),
        model([ATTENTION | {"qk_norm": NORM}] * L, GLU, {"kind": "pre", "norm": NORM}),
        llama_names(PRE),
    )


def olmo2() -> Published:
    from transformers import Olmo2Config

    attention = ATTENTION | {"head_dim": H // N, "qk_norm": NORM, "qk_norm_over": "all"}
    return Published(
        lambda: Olmo2Config(**SHARED),
        model([attention] * L, GLU, {"kind": "res_post", "norm": NORM}),
        llama_names(RES_POST),
    )


def gemma3() -> Published:
    from transformers import Gemma3TextConfig

    norm = NORM | {"offset": 1.0}
    attention = ATTENTION | {"qk_norm": norm, "scale": 16**-0.5}
    near = attention | {"mask": {"kind": "window", "size": 4}}
    far = attention | {"position": {"kind": "rope", "base": 1000000.0}}
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    shared = SHARED | {"tie_word_embeddings": True}
    return Published(
        lambda: Gemma3TextConfig(
            **shared,
            head_dim=D,
            sliding_window=4,
            layer_types=kinds,
            rope_parameters=rope,
            query_pre_attn_scalar=16,
        ),
        model(
            [near, near, far],
            GLU | {"activation": "gelu_tanh"},
            {"kind": "sandwich", "norm": norm},
            norm=norm,
            head="tied",
            embedding={"kind": "token", "scale": H**0.5},
        ),
        llama_names(SANDWICH, tied=True),
    )


GPT2_ROLES = {
    "ln_1": "mixer_residual.norm",
    "ln_2": "ffn_residual.norm",
    "attn.q": "mixer.q",
    "attn.k": "mixer.k",
    "attn.v": "mixer.v",
    "attn.c_proj": "mixer.out",
    "mlp.c_fc": "ffn.up",
    "mlp.c_proj": "ffn.down",
}


def gpt2_names(name: str) -> str | None:
    name = name.removeprefix("transformer.")
    if name == "lm_head.weight":
        return None
    if not name.startswith("h."):
        return name.replace("wte", "embed").replace("wpe", "embed.places").replace("ln_f", "norm")
    _, layer, *middle, last = name.split(".")
    return f"blocks.{layer}.{GPT2_ROLES['.'.join(middle)]}.{last}"


def gpt2_split(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their fused, transposed matrices as ours; the same for gradients."""
    out = {}
    for name, value in state.items():
        if ".c_" in name and name.endswith("weight"):
            value = value.T
        if "c_attn" in name:
            parts = zip("qkv", value.chunk(3, 0), strict=True)
            out |= {name.replace("c_attn", role): part for role, part in parts}
        else:
            out[name] = value
    return out


def gpt2() -> Published:
    from transformers import GPT2Config

    norm = {"kind": "layernorm", "eps": 1e-5}
    attention = {"kind": "gqa", "heads": N, "head_dim": H // N, "position": "nope", "bias": "all"}
    return Published(
        lambda: GPT2Config(
            n_embd=H,
            n_head=N,
            n_layer=L,
            n_inner=F,
            vocab_size=V,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        ),
        model(
            [attention] * L,
            {"kind": "mlp", "inner": F, "activation": "gelu_tanh", "bias": True},
            {"kind": "pre", "norm": norm},
            norm=norm,
            head="tied",
            embedding={"kind": "learned", "length": 64},
        ),
        gpt2_names,
        split=gpt2_split,
    )


LATENT = {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
LATENT_ROLES = {
    "self_attn.q_a_proj": "mixer.q_down",
    "self_attn.q_a_layernorm": "mixer.q_norm",
    "self_attn.q_b_proj": "mixer.q",
    "self_attn.kv_a_proj_with_mqa": "mixer.kv_down",
    "self_attn.kv_a_layernorm": "mixer.kv_norm",
    "self_attn.kv_b_proj": "mixer.kv_up",
}


def deepseek(config: str, rope: dict[str, Any] | None = None, **other: Any) -> Callable[[], Published]:
    """Layers with latent attention, dense ones unless `other` says so; their norms on latents have an eps of their own.
    `rope` is the scaling in their words; `other` are fields of theirs, of which those on widths are ours too."""

    def published() -> Published:
        import transformers

        widths = LATENT | {name: value for name, value in other.items() if name in LATENT}
        shared = SHARED | LATENT | {"num_key_value_heads": N, "first_k_dense_replace": L} | other
        layout = "interleaved" if other.get("rope_interleave", True) else "half"
        attention = {"kind": "mla", "heads": N, "norm": {"kind": "rmsnorm", "eps": 1e-6}} | widths
        attention["position"] = position(rope) | {"layout": layout}
        return Published(
            lambda: getattr(transformers, config)(**shared, rope_parameters=rope or PLAIN),
            model([attention] * L, GLU, {"kind": "pre", "norm": NORM}),
            llama_names(PRE | LATENT_ROLES),
        )

    return published


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA31 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
WIDER = {"qk_rope_head_dim": 8}  # pairs before, on and behind the ramp of YARN


def position(rope: dict[str, Any] | None) -> dict[str, Any]:
    """Our words for their `rope_parameters`."""
    rope = dict(rope or PLAIN)
    kind, base = rope.pop("rope_type"), rope.pop("rope_theta")
    scaling = {key.replace("max_position_embeddings", "length"): value for key, value in rope.items()}
    return {"kind": "rope", "base": base, "scaling": None if kind == "default" else {"kind": kind} | scaling}


PUBLISHED = {
    "llama": llama,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "llama-3.1": lambda: llama(LLAMA31),
    "llama-yarn": lambda: llama(YARN | {"truncate": False}),
    "deepseek-v2-lite": deepseek("DeepseekV2Config", q_lora_rank=None),
    "deepseek-v2-yarn": deepseek("DeepseekV2Config", YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}, **WIDER),
    "deepseek-v3": deepseek("DeepseekV3Config"),
    "deepseek-v3-yarn": deepseek("DeepseekV3Config", YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, **WIDER),
    "deepseek-v3-half": deepseek("DeepseekV3Config", rope_interleave=False),
}


def random_weights(theirs: torch.nn.Module) -> None:
    """Move every weight away from its start, norms too, so that no role can be taken for another; and the biases on
    the choice of experts, which are no weights."""
    generator = torch.Generator().manual_seed(5)
    biases = [value for name, value in theirs.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for weight in (*theirs.parameters(), *biases):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.2)
