"""Gemma 2: windows in every other layer, norms on both sides of each branch, soft caps on scores and logits.

Paper: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size", arXiv:2408.00118, section 2.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, gemma
from shardforge.families.family import Family, windows
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings

SCORES = 50.0


def model(settings: Settings) -> dict[str, Any]:
    far = gemma.attention(settings) | {"softcap": gemma.cap(settings, "attn_logit_softcapping", SCORES)}
    layers, size = decoder.depth(settings), settings.get("sliding_window", gemma.WINDOW)
    settings.only("sliding_window_size", size)
    seen = windows(settings, layers, size, [None if layer % 2 else size for layer in range(layers)])
    mixers = {"near": far | {"mask": {"kind": "window", "size": size}}, "far": far}
    stack = ["far" if each is None else "near" for each in seen]
    return gemma.model(settings, mixers, stack, gemma.cap(settings, "final_logit_softcapping", gemma.LOGITS))


def config(section: dict[str, Any]) -> dict[str, Any]:
    found = gemma.config(section, "Gemma2ForCausalLM", "gemma2")
    return found | {"attn_logit_softcapping": blocks_of(section)[0]["mixer"]["softcap"]}


FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    model=model,
    config=config,
    table=lambda _: gemma.TABLE,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
