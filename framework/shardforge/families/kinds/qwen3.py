"""Qwen3, dense: Llama with a norm on the queries and keys of each head.

Paper: Yang et al. 2025, "Qwen3 Technical Report", arXiv:2505.09388, section 2.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    norm, layers = decoder.norm(settings, 1e-6), decoder.depth(settings)
    bias = decoder.biases(settings)
    mixer = decoder.attention(settings, bias=bias, qk_norm=norm, kv_heads=32, head_dim=128)
    ffns = [decoder.glu(settings)] * layers
    return decoder.model(settings, norm, mixer, ffns, seen=decoder.windows_above(settings, layers))


def config(section: dict[str, Any]) -> dict[str, Any]:
    found = decoder.config(section, "Qwen3ForCausalLM", "qwen3") | decoder.window_config(section)
    return found | decoder.glu_config(blocks_of(section)[0]["ffn"])


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
