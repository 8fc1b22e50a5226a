"""OLMoE: a mixture in each layer, its weights as the softmax gives them; norms on queries and keys over all heads.

Paper: Muennighoff et al. 2024, "OLMoE", arXiv:2409.02060, section 2.
Limits: clip_qkv.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, mixtures
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    norm, heads = decoder.norm(settings, 1e-5), settings.need("num_attention_heads")
    settings.only("head_dim", settings.need("hidden_size") // heads)  # their norm on queries is hidden_size wide
    bias = decoder.biases(settings)
    mixer = decoder.attention(settings, bias=bias, qk_norm=norm, qk_norm_over="all", kv_heads=heads)
    weights = "renormalized" if settings.get("norm_topk_prob", False) else "raw"
    experts = mixtures.count(settings)
    ffn = mixtures.moe(settings, experts, settings.need("intermediate_size"), weights=weights, coefficient=0.01)
    return decoder.model(settings, norm, mixer, [ffn] * decoder.depth(settings))


def config(section: dict[str, Any]) -> dict[str, Any]:
    ffn = blocks_of(section)[0]["ffn"]
    return {
        **decoder.config(section, "OlmoeForCausalLM", "olmoe"),
        **mixtures.moe_config(ffn),
        "num_experts": ffn["experts"],
        "intermediate_size": ffn["inner"],
        "norm_topk_prob": ffn["router"]["weights"] == "renormalized",
        "clip_qkv": None,
    }


FAMILY = Family(
    architectures=("OlmoeForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE, mixtures.expert_rows("mlp", "mlp.gate")),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
