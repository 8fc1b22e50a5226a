"""Mistral 7B and its successors: Llama without biases, whose layers may all see only a window.

Paper: Jiang et al. 2023, "Mistral 7B", arXiv:2310.06825.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    norm = decoder.norm(settings, 1e-6)
    mixer = decoder.attention(settings, kv_heads=8)
    layers = decoder.depth(settings)
    windows = [settings.given("sliding_window", 4096)] * layers
    return decoder.model(settings, norm, mixer, [decoder.glu(settings)] * layers, seen=windows)


def config(section: dict[str, Any]) -> dict[str, Any]:
    found = decoder.config(section, "MistralForCausalLM", "mistral")
    window = {"sliding_window": decoder.sizes(section)[0]}
    return found | decoder.glu_config(blocks_of(section)[0]["ffn"]) | window


FAMILY = Family(
    architectures=("MistralForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
