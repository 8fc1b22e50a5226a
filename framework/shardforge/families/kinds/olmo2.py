"""OLMo 2: norms after the branches, and on queries and keys over all heads together.

Paper: OLMo Team 2024, "2 OLMo 2 Furious", arXiv:2501.00656, section 2.1.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    heads, norm = settings.get("num_attention_heads"), decoder.norm(settings, 1e-5)
    bias = decoder.biases(settings)
    mixer = decoder.attention(settings, bias=bias, qk_norm=norm, qk_norm_over="all", kv_heads=heads)
    ffns = [decoder.glu(settings)] * decoder.depth(settings)
    return decoder.model(settings, norm, mixer, ffns, residual="res_post")


def config(section: dict[str, Any]) -> dict[str, Any]:
    found = decoder.config(section, "Olmo2ForCausalLM", "olmo2")
    return found | decoder.glu_config(blocks_of(section)[0]["ffn"])


FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.RES_POST),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
