"""Qwen3, dense: Llama with a norm on the queries and keys of each head.

Paper: Yang et al. 2025, "Qwen3 Technical Report", arXiv:2505.09388, section 2.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.settings import Settings
from shardforge.families.table import rows


def model(settings: Settings) -> dict[str, Any]:
    return decoder.model(settings, qk_norm="head")


FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    model=model,
    table=rows(decoder.names(decoder.PRE)),
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
