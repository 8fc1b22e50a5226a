"""What DeepSeek-V2 and V3 share: latent attention, dense layers before mixtures, one table of names.

Sources: the released config.json files and weights, and the classes of transformers, which say what a field means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shardforge.families import decoder
from shardforge.families.decoder import WORDS
from shardforge.families.family import ACTIVATIONS, rope, rope_config
from shardforge.families.forms import EXPERTS, SAME, Paired
from shardforge.families.mixtures import ROLES
from shardforge.families.section import layers as blocks_of
from shardforge.families.section import plainer
from shardforge.families.settings import Settings
from shardforge.families.table import Row, layers, rows

WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LATENT_EPS = 1e-6
"""Of the norms on latents, whatever rms_norm_eps is."""
IDLE = ("head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux")
"""Fields that follow from others, or count in training alone."""
UNUSED = (
    *("intermediate_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    *("n_group", "topk_group", "topk_method", "scoring_func", "norm_topk_prob", "routed_scaling_factor"),
)
"""Fields that mean nothing in a model without dense layers, or without mixtures."""
BLOCK = {
    "mixer.q_down": "self_attn.q_a_proj",
    "mixer.q_norm": "self_attn.q_a_layernorm",
    "mixer.kv_norm": "self_attn.kv_a_layernorm",
    "mixer.kv_up": "self_attn.kv_b_proj",
    "mixer.out": "self_attn.o_proj",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
    "ffn.router": "mlp.gate",
    **decoder.GLU,
    **decoder.PRE,
}


def model(
    settings: Settings, router: Callable[[Settings], dict[str, Any]], *, dense: int, layout: str, further: int = 0
) -> dict[str, Any]:
    """The model section; `dense` layers come before the mixtures where the settings have no say, and `further` modules
    of further tokens, which are mixtures, behind the last layer."""
    norm, depth = decoder.norm(settings, 1e-6), decoder.depth(settings)
    mixed = settings.given("n_routed_experts", 0) is not None  # null is a dense model; left out it is missing
    first = count(settings, "first_k_dense_replace", dense)
    settings.only("moe_layer_freq", 1)
    settings.only("mlp_bias", False)
    for field in (*IDLE, *UNUSED):
        settings.get(field)
    first = min(first, depth) if mixed else depth
    plain = decoder.glu(settings) if first else {}
    moe = _mixture(settings, router) if first < depth or further else {}
    mixer = _mixer(settings, layout)
    section = decoder.model(settings, norm, mixer, [plain] * first + [moe] * (depth - first))
    if not further:
        return section
    behind = {"mixer": mixer, "ffn": moe, "residual": {"kind": "pre", "norm": norm}}
    mtp = {"depth": further, "block": "moe", "concat": "embed_first", "hidden": "after_norm", "norm": norm}
    return section | {"blocks": section["blocks"] | {"moe": behind}, "mtp": mtp}


def count(settings: Settings, key: str, default: int) -> int:
    """A number of layers, which may be 0."""
    found = settings.get(key, default)
    if type(found) is int and found >= 0:
        return found
    settings.wrong(f"{key} is {found!r}, not a number of layers")
    return default


def _mixer(settings: Settings, layout: str) -> dict[str, Any]:
    heads = settings.need("num_attention_heads")
    settings.only("num_key_value_heads", heads)
    settings.only("attention_bias", False)
    position = rope(settings) | {"layout": layout}
    if position["fraction"] != 1.0:
        settings.wrong(f"partial_rotary_factor={position['fraction']} is not supported by this architecture, only 1.0")
    scaling = position.get("scaling") or {}
    told = {key: scaling[key] for key in ("mscale", "mscale_all_dim") if key in scaling}
    if told and not (len(told) == 2 and all(told.values())):
        given = ", ".join(f"{key}={value}" for key, value in told.items())
        settings.wrong(f"{given}: programs disagree on one of mscale and mscale_all_dim that is 0 or missing")
    return {
        "kind": "mla",
        "heads": heads,
        "q_lora_rank": settings.given("q_lora_rank", 1536),  # null is none
        **{width: settings.need(width) for width in WIDTHS},
        "position": position,
        "norm": {"kind": "rmsnorm", "eps": LATENT_EPS},
    }


def _mixture(settings: Settings, router: Callable[[Settings], dict[str, Any]]) -> dict[str, Any]:
    inner, activation = settings.need("moe_intermediate_size"), settings.choose("hidden_act", ACTIVATIONS, "silu")
    together = inner * settings.need("n_shared_experts")
    return {
        "kind": "moe",
        "experts": settings.need("n_routed_experts"),
        "k": settings.need("num_experts_per_tok"),
        "inner": inner,
        "activation": activation,
        "shared": {"kind": "glu", "inner": together, "activation": activation},
        "router": router(settings),
    }


def config(
    section: dict[str, Any], architecture: str, model_type: str, router: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """config.json of a whole model section, as far as both families agree; `router` says that of a mixture."""
    blocks = blocks_of(section)
    mixer = blocks[0]["mixer"]
    first = next((at for at, block in enumerate(blocks) if block["ffn"]["kind"] == "moe"), len(blocks))
    behind = [section["blocks"][section["mtp"]["block"]]] if section["mtp"] else []
    mixture = next((each["ffn"] for each in [*blocks[first:], *behind] if each["ffn"]["kind"] == "moe"), None)
    unit = blocks[0]["ffn"]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": section["vocab"],
        "hidden_size": section["hidden"],
        "intermediate_size": unit["inner"],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": mixer["heads"],
        "num_key_value_heads": mixer["heads"],
        "q_lora_rank": mixer["q_lora_rank"],
        **{width: mixer[width] for width in WIDTHS},
        "hidden_act": WORDS[unit["activation"]],
        "first_k_dense_replace": first,
        "moe_layer_freq": 1,
        **(_experts(mixture) | router(mixture["router"]) if mixture else {}),
        "rms_norm_eps": section["norm"]["eps"],
        "tie_word_embeddings": section["head"]["kind"] == "tied",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": section["init"]["std"],
        **rope_config(plainer(mixer["position"], mixer["qk_rope_head_dim"])),
    }


def _experts(mixture: dict[str, Any]) -> dict[str, Any]:
    """A mixture without a shared unit, or with one that is no multiple of an expert, has no words here."""
    together = mixture["shared"]["inner"] if mixture["shared"] else 0
    return {
        "n_routed_experts": mixture["experts"],
        "n_shared_experts": max(1, together // mixture["inner"]),
        "num_experts_per_tok": mixture["k"],
        "moe_intermediate_size": mixture["inner"],
    }


def block(section: dict[str, Any], ours: str, theirs: str, *, paired: bool = False) -> Iterator[Row]:
    """The rows of the weights of blocks, whose names begin so; `paired` says that theirs turn neighbouring channels,
    while those of the section turn the other ones."""
    mixer = blocks_of(section)[0]["mixer"]
    turning = mixer["qk_rope_head_dim"]
    queries = Paired(mixer["heads"], turning, mixer["qk_nope_head_dim"]) if paired else SAME
    keys = Paired(1, turning, mixer["kv_lora_rank"]) if paired else SAME
    q = "q_proj" if mixer["q_lora_rank"] is None else "q_b_proj"
    yield Row((f"{ours}.mixer.q.weight",), (f"{theirs}.self_attn.{q}.weight",), queries)
    yield Row((f"{ours}.mixer.kv_down.weight",), (f"{theirs}.self_attn.kv_a_proj_with_mqa.weight",), keys)
    yield Row((f"{ours}.ffn.router.selection_bias",), (f"{theirs}.mlp.gate.e_score_correction_bias",))
    for role, name in ROLES.items():
        one = f"{theirs}.mlp.experts.{{expert}}.{name}.weight"
        yield Row((f"{ours}.ffn.experts.{role}",), (one,), EXPERTS, each="expert")
    yield from rows(layers(ours, theirs, BLOCK))
