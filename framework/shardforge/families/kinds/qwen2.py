"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Paper: Yang et al. 2024, "Qwen2 Technical Report", arXiv:2407.10671, section 2.2.1.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    norm, layers = decoder.norm(settings, 1e-6), decoder.depth(settings)
    mixer = decoder.attention(settings, bias="qkv", kv_heads=32)
    ffns = [decoder.glu(settings)] * layers
    return decoder.model(settings, norm, mixer, ffns, seen=decoder.windows_above(settings, layers))


def config(section: dict[str, Any]) -> dict[str, Any]:
    found = decoder.config(section, "Qwen2ForCausalLM", "qwen2") | decoder.window_config(section)
    return found | decoder.glu_config(blocks_of(section)[0]["ffn"])


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
