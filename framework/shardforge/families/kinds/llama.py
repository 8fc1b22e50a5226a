"""Llama 1 to 3.3, and what kept its architecture: SmolLM2, llm-jp-3, Yi and others.

Paper: Touvron et al. 2023, "LLaMA", arXiv:2302.13971; Grattafiori et al. 2024, "The Llama 3 Herd of Models",
    arXiv:2407.21783.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    hidden, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    if hidden % heads and settings.get("head_dim") is not None:
        settings.wrong(f"hidden_size={hidden} is no multiple of num_attention_heads={heads}, as it must be for Llama")
    norm = decoder.norm(settings, 1e-6)
    mixer = decoder.attention(settings, bias=decoder.biases(settings), kv_heads=heads)
    ffn = decoder.glu(settings, bias=bool(settings.get("mlp_bias", False)))
    return decoder.model(settings, norm, mixer, [ffn] * decoder.depth(settings))


def config(section: dict[str, Any]) -> dict[str, Any]:
    ffn = blocks_of(section)[0]["ffn"]
    found = decoder.config(section, "LlamaForCausalLM", "llama") | decoder.glu_config(ffn)
    return found | {"mlp_bias": ffn["bias"]}


FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
