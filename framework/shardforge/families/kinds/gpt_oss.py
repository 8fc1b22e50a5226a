"""gpt-oss: windows in every other layer, a learned sink for each query head, experts of clamped units with biases.

Paper: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv:2508.10925, section 2, and the released config.json.
Limits: experts released in MXFP4 are read dequantised (`families.mxfp4`) and written in bfloat16, which is exact.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, mixtures, mxfp4
from shardforge.families.decoder import OURS, THEIRS
from shardforge.families.family import Family, windows
from shardforge.families.forms import Alternating
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings
from shardforge.families.table import Row, layers, rows

WINDOW, GROUPS, WIDTH, CLAMP, BASE = 128, 8, 64, 7.0, 150000.0
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What the architecture takes where the settings have no say."""
PLAIN = {"rope_type": "default"}
SHARPNESS, COEFFICIENT = 1.702, 0.001
ROUTER = {"kind": "topk", "order": "topk_first", "bias": True}

UNITS, PLACE = f"{OURS}.ffn.experts", f"{THEIRS}.mlp.experts"
TABLE: tuple[Row, ...] = (
    *rows(decoder.TOP | layers(OURS, THEIRS, decoder.ATTENTION | decoder.PRE | {"ffn.router": "mlp.router"})),
    Row((f"{OURS}.mixer.sinks",), (f"{THEIRS}.self_attn.sinks",)),
    Row((f"{UNITS}.gate", f"{UNITS}.up"), (f"{PLACE}.gate_up_proj",), Alternating()),
    Row((f"{UNITS}.gate_bias", f"{UNITS}.up_bias"), (f"{PLACE}.gate_up_proj_bias",), Alternating()),
    Row((f"{UNITS}.down",), (f"{PLACE}.down_proj",)),
    Row((f"{UNITS}.down_bias",), (f"{PLACE}.down_proj_bias",)),
)


def model(settings: Settings) -> dict[str, Any]:
    count, size = decoder.depth(settings), settings.get("sliding_window", WINDOW)
    settings.get("initial_context_length")  # the length before YaRN again
    settings.only("swiglu_alpha", SHARPNESS)
    settings.only("experts_per_token", settings.get("num_experts_per_tok"))
    settings.only("hidden_act", "silu")
    turning = settings
    if settings.get("rope_parameters") is None and not settings.get("rope_scaling"):
        turning = settings.changed({"rope_scaling": YARN})
    bias = "all" if settings.get("attention_bias", True) else "none"
    mixer = decoder.attention(turning, bias=bias, kv_heads=GROUPS, head_dim=WIDTH, base=BASE) | {"sinks": "learned"}
    experts = mixtures.count(settings)
    ffn = mixtures.moe(
        settings, experts, settings.need("intermediate_size"), weights="renormalized", coefficient=COEFFICIENT
    )
    ffn |= {"router": ROUTER, "bias": True, "clamp": settings.positive("swiglu_limit", CLAMP)}
    seen = windows(settings, count, size, [None if layer % 2 else size for layer in range(count)])
    return decoder.model(settings, decoder.norm(settings, 1e-5), mixer, [ffn] * count, seen=seen)


def config(section: dict[str, Any]) -> dict[str, Any]:
    ffn = blocks_of(section)[0]["ffn"]
    seen = decoder.sizes(section)
    found = {"rope_scaling": PLAIN} | decoder.config(section, "GptOssForCausalLM", "gpt_oss")
    return found | {
        "intermediate_size": ffn["inner"],
        "num_local_experts": ffn["experts"],
        **mixtures.moe_config(ffn),
        "experts_per_token": ffn["k"],
        "swiglu_limit": ffn["clamp"],
        "sliding_window": next((size for size in seen if size is not None), WINDOW),
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in seen],
    }


FAMILY = Family(
    architectures=("GptOssForCausalLM",),
    model=model,
    config=config,
    table=lambda _: TABLE,
    tied="lm_head.weight",
    spare=decoder.SPARE,
    decoded=mxfp4.decoded,
)
