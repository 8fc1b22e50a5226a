"""OLMo 2: norms after the branches, and on queries and keys over all heads together.

Paper: OLMo Team 2024, "2 OLMo 2 Furious", arXiv:2501.00656, section 2.1.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family
from shardforge.families.settings import Settings
from shardforge.families.table import rows


def model(settings: Settings) -> dict[str, Any]:
    heads = settings.get("num_attention_heads")
    return decoder.model(settings, residual="res_post", qk_norm="all", kv_heads=heads)


FAMILY = Family(
    architectures=("Olmo2ForCausalLM",),
    model=model,
    table=rows(decoder.names(decoder.RES_POST)),
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
