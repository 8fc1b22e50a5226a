"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Paper: Yang et al. 2024, "Qwen2 Technical Report", arXiv:2407.10671, section 2.2.1.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.settings import Settings
from shardforge.families.table import rows


def model(settings: Settings) -> dict[str, Any]:
    settings.only("attention_bias", False)  # the architecture has no such setting: its biases are always there
    return decoder.model(settings, bias="qkv")


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model=model,
    table=rows(decoder.names(decoder.PRE)),
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
