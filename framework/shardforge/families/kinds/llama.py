"""Llama, and what kept its architecture: Mistral, SmolLM2, llm-jp, Yi and others.

Paper: Touvron et al. 2023, "LLaMA", arXiv:2302.13971; Jiang et al. 2023, "Mistral 7B", arXiv:2310.06825.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.settings import Settings
from shardforge.families.table import rows


def model(settings: Settings) -> dict[str, Any]:
    if settings.get("model_type") == "mistral":
        return decoder.model(settings, eps=1e-6, windowed=True)
    return decoder.model(settings, kv_heads=settings.get("num_attention_heads"), eps=1e-6)


FAMILY = Family(
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model=model,
    table=rows(decoder.names(decoder.PRE)),
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
