"""Published mixtures of experts, tiny and random, described as in `models`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from shardforge.model.balance import from_transformers
from tests.parity.models import (
    ATTENTION,
    GLU,
    LATENT_ROLES,
    NORM,
    PLAIN,
    PRE,
    SHARED,
    YARN,
    D,
    F,
    H,
    L,
    N,
    Published,
    deepseek,
    llama_names,
    model,
    position,
)

E, K, X = 12, 4, 20
"""experts, experts of a token, width of an expert."""

THEIRS = SHARED | {"num_experts_per_tok": K, "experts_implementation": "eager"}
EXPERTS = {"kind": "moe", "experts": E, "k": K, "inner": X}
RAW = {"kind": "topk", "weights": "raw"}
RESIDUAL = {"kind": "pre", "norm": NORM}
ROLES = {"mlp.gate": "ffn.router", "mlp.router": "ffn.router", "mlp.experts": "ffn.experts", "self_attn": "mixer"}
ROLES |= {f"mlp.shared_experts.{role}_proj": f"ffn.shared.{role}" for role in ("gate", "up", "down")}
NAMES = llama_names(PRE | LATENT_ROLES | ROLES)


def mixed(section: dict[str, Any], ffn: dict[str, Any], dense: Collection[int] = ()) -> dict[str, Any]:
    """A model section with that ffn in all layers but the `dense` ones."""
    blocks = section["blocks"]
    kept = {f"b{layer}" for layer in dense}
    return section | {"blocks": {name: b if name in kept else b | {"ffn": ffn} for name, b in blocks.items()}}


def stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors [e, out, in], in which up follows gate, as ours [e, in, out]; the same for gradients."""
    out = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            parts = zip(("gate", "up"), value.transpose(1, 2).chunk(2, -1), strict=True)
            out |= {name.replace("gate_up_proj", role): part for role, part in parts}
        elif name.endswith("experts.down_proj"):
            out[name.removesuffix("_proj")] = value.transpose(1, 2)
        else:
            out[name.replace("e_score_correction_bias", "selection_bias")] = value
    return out


def interleaved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors [e, in, out], in which gate and up take turns, as ours."""
    out = {}
    for name, value in state.items():
        if "experts.gate_up_proj" in name:
            parts = {"gate": value[..., ::2], "up": value[..., 1::2]}
            out |= {name.replace("gate_up_proj", role): part for role, part in parts.items()}
        else:
            out[name.replace("experts.down_proj", "experts.down")] = value
    return out


def mixtral() -> Published:
    from transformers import MixtralConfig

    return Published(
        lambda: MixtralConfig(**THEIRS, num_local_experts=E, head_dim=D, rope_parameters=PLAIN),
        model([ATTENTION] * L, EXPERTS | {"inner": F}, RESIDUAL),
        NAMES,
        split=stacked,
    )


def qwen3_moe() -> Published:
    """With a dense layer between mixtures, which their config allows."""
    from transformers import Qwen3MoeConfig

    more = {"num_experts": E, "moe_intermediate_size": X, "norm_topk_prob": True, "mlp_only_layers": [1]}
    return Published(
        lambda: Qwen3MoeConfig(**THEIRS, **more, head_dim=D, rope_parameters=PLAIN),
        mixed(model([ATTENTION | {"qk_norm": NORM}] * L, GLU, RESIDUAL), EXPERTS, dense=[1]),
        NAMES,
        split=stacked,
    )


def olmoe() -> Published:
    from transformers import OlmoeConfig

    attention = ATTENTION | {"head_dim": H // N, "qk_norm": NORM, "qk_norm_over": "all"}
    return Published(
        lambda: OlmoeConfig(**THEIRS, num_experts=E, rope_parameters=PLAIN),
        model([attention] * L, EXPERTS | {"inner": F, "router": RAW}, RESIDUAL),
        NAMES,
        split=stacked,
    )


def deepseek_moe(config: str, router: dict[str, Any], **other: Any) -> Callable[[], Published]:
    """One dense layer, then mixtures beside two shared experts, which are one of twice the width."""

    def published() -> Published:
        sizes = {"n_routed_experts": E, "moe_intermediate_size": X, "n_shared_experts": 2, "first_k_dense_replace": 1}
        choice = {"num_experts_per_tok": K, "experts_implementation": "eager"}
        made = deepseek(config, None, **sizes, **choice, **other)()
        ffn = EXPERTS | {"router": router, "shared": {"kind": "glu", "inner": 2 * X}}
        return replace(made, model=mixed(made.model, ffn, dense=[0]), rename=NAMES, split=stacked)

    return published


def gpt_oss() -> Published:
    """Their limits on gate and up are tightened, so that they limit something here."""
    from transformers import GptOssConfig

    rope = YARN | {"truncate": False}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    more = {"num_local_experts": E, "swiglu_limit": 0.5, "sliding_window": 4, "layer_types": kinds}
    far = ATTENTION | {"position": position(rope), "bias": "all", "sinks": "learned"}
    near = far | {"mask": {"kind": "window", "size": 4}}
    router = {"kind": "topk", "order": "topk_first", "bias": True}
    return Published(
        lambda: GptOssConfig(**THEIRS, **more, head_dim=D, rope_parameters=rope),
        model([near, far, near], EXPERTS | {"inner": F, "router": router, "bias": True, "clamp": 0.5}, RESIDUAL),
        NAMES,
        split=interleaved,
    )


V2 = RAW | {"scale": 4.0}
V3 = {"kind": "topk", "score": "sigmoid", "scale": 2.5, "groups": 4, "group_topk": 2, "selection_bias": {}}
GROUPS = {"n_group": 4, "topk_group": 2}

MIXTURES: dict[str, Callable[[], Published]] = {
    "mixtral": mixtral,
    "qwen3-moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek-v2-lite-moe": deepseek_moe("DeepseekV2Config", V2, q_lora_rank=None, routed_scaling_factor=4.0),
    "deepseek-v2-moe": deepseek_moe(
        "DeepseekV2Config",
        V2 | {"groups": 4, "group_topk": 2, "group_score": "max"},
        **GROUPS,
        topk_method="group_limited_greedy",
        routed_scaling_factor=4.0,
    ),
    "deepseek-v3-moe": deepseek_moe("DeepseekV3Config", V3, **GROUPS, norm_topk_prob=True, routed_scaling_factor=2.5),
    "gpt-oss": gpt_oss,
}

CHARGED = ("mixtral", "qwen3-moe", "olmoe", "gpt-oss")
"""Those for which the library has a loss for even use of experts."""


def charged(name: str, coefficient: float) -> Published:
    """A mixture whose loss for even use is part of the total, as the library's `router_aux_loss_coef`."""
    published = MIXTURES[name]()
    section = changed(published.model, lambda ffn: {"balance": [asdict(from_transformers(coefficient, K))]})

    def config() -> Any:
        made = published.config()
        made.router_aux_loss_coef = coefficient
        return made

    return replace(published, config=config, model=section)


def routed(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A model section with other routers."""
    return changed(section, lambda ffn: {"router": ffn.get("router", {"kind": "topk"}) | changes})


def changed(section: dict[str, Any], changes: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A model section with other mixtures, given what changes in each."""
    blocks = {
        name: block | {"ffn": block["ffn"] | changes(block["ffn"])} if block["ffn"]["kind"] == "moe" else block
        for name, block in section["blocks"].items()
    }
    return section | {"blocks": blocks}
