"""Gemma 3, text alone: five layers with windows and quick positions to one that sees all, norms on queries and keys.

Paper: Gemma Team 2025, "Gemma 3 Technical Report", arXiv:2503.19786, section 2.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, gemma
from shardforge.families.family import Family, rope, rope_config, windows
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings

NEAR, FAR = "sliding_attention", "full_attention"
NEAR_BASE, FAR_BASE = 10000.0, 1000000.0
PERIOD = 6


def model(settings: Settings) -> dict[str, Any]:
    settings.unknown(["attn_logit_softcapping"], "this architecture has no place for it; transformers leaves it out")
    near, far = _turning(settings)
    mixer = gemma.attention(far, qk_norm=gemma.norm(settings))
    quick = rope(near)
    if quick["fraction"] != 1.0:
        settings.wrong(f"partial_rotary_factor={quick['fraction']} is not supported by this architecture, only 1.0")
    layers, size = decoder.depth(settings), settings.get("sliding_window", gemma.WINDOW)
    every = settings.get("sliding_window_pattern", settings.get("_sliding_window_pattern", PERIOD))
    if type(every) is not int or every < 1:
        settings.wrong(f"sliding_window_pattern={every!r} is no positive integer")
        every = PERIOD
    usual = [size if (layer + 1) % every else None for layer in range(layers)]
    stack = ["far" if each is None else "near" for each in windows(settings, layers, size, usual)]
    mask = {"kind": "window", "size": size}
    mixers = {"near": mixer | {"mask": mask, "position": quick}, "far": mixer}
    return gemma.model(settings, mixers, stack, gemma.cap(settings, "final_logit_softcapping", None))


def _turning(settings: Settings) -> tuple[Settings, Settings]:
    """The settings as layers with a window mean them, and as those without do: transformers 5 has a mapping for each
    kind of layer, versions before it have fields of two names."""
    told = dict(settings.get("rope_parameters", {}))
    near, far = (told.pop(key, None) or {} for key in (NEAR, FAR))
    if not (isinstance(near, dict) and isinstance(far, dict)):
        settings.wrong(f"rope_parameters of {NEAR} and {FAR} should be mappings, not {near!r} and {far!r}")
        near = far = {}
    if told:
        settings.wrong(f"rope_parameters has {', '.join(sorted(told))} beside {NEAR} and {FAR}")
    far = far | settings.get("rope_scaling", {})
    near_base = settings.get("rope_local_base_freq", NEAR_BASE)
    far_base = settings.get("rope_theta", FAR_BASE)
    return (
        settings.changed({"rope_parameters": near, "rope_scaling": None, "rope_theta": near_base}),
        settings.changed({"rope_parameters": far, "rope_scaling": None, "rope_theta": far_base}),
    )


def config(section: dict[str, Any]) -> dict[str, Any]:
    mixers = [block["mixer"] for block in blocks_of(section)]
    near = [mixer["position"] for mixer in mixers if mixer["mask"]["kind"] == "window"]
    far = [mixer["position"] for mixer in mixers if mixer["mask"]["kind"] == "causal"]
    found = gemma.config(section, "Gemma3ForCausalLM", "gemma3_text") | {"rope_scaling": None}
    found |= rope_config(far[0]) if far else {"rope_theta": FAR_BASE}
    return found | {"rope_local_base_freq": near[0]["base"] if near else NEAR_BASE}


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    model=model,
    config=config,
    table=lambda _: gemma.TABLE,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
