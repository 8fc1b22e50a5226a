"""Mixtral, a Mistral with a mixture in each layer; and llm-jp-3 and Drop-Upcycling, which have its layout.

Paper: Jiang et al. 2024, "Mixtral of Experts", arXiv:2401.04088.
Limits: router_jitter_noise, which in transformers moves what the experts see too.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, mixtures
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings

ROLES = {"gate": "w1", "up": "w3", "down": "w2"}
EXPERTS = mixtures.expert_rows("block_sparse_moe", "block_sparse_moe.gate", ROLES)


def model(settings: Settings) -> dict[str, Any]:
    norm, layers = decoder.norm(settings, 1e-5), decoder.depth(settings)
    mixer = decoder.attention(settings, kv_heads=8, base=1000000.0)
    settings.only("router_jitter_noise", 0)
    experts, inner = mixtures.count(settings), settings.need("intermediate_size")
    ffn = mixtures.moe(settings, experts, inner, weights="renormalized", coefficient=0.001)
    return decoder.model(settings, norm, mixer, [ffn] * layers, seen=[settings.get("sliding_window")] * layers)


def config(section: dict[str, Any]) -> dict[str, Any]:
    ffn = blocks_of(section)[0]["ffn"]
    return {
        **decoder.config(section, "MixtralForCausalLM", "mixtral"),
        **mixtures.moe_config(ffn),
        "num_local_experts": ffn["experts"],
        "intermediate_size": ffn["inner"],
        "sliding_window": decoder.sizes(section)[0],
        "router_jitter_noise": 0.0,
    }


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE, EXPERTS),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
