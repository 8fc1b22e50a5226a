"""SmolLM3: Llama, some of whose layers have no positions.

Paper: Bakouch et al. 2025, "SmolLM3" (its release); layers without positions are Yang et al. 2025, "Rope to Nope and
    Back Again", arXiv:2501.18795.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder
from shardforge.families.family import Family, windows
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def turning(settings: Settings, layers: int) -> list[bool]:
    """Whether each layer has positions."""
    every, told = decoder.period(settings, "no_rope_layer_interval", 4), settings.get("no_rope_layers", [])
    if not told:
        return [(layer + 1) % every != 0 for layer in range(layers)]
    if len(told) < layers:
        settings.wrong(f"no_rope_layers has {len(told)} entries, num_hidden_layers is {layers}")
    return [bool(each) for each in told[:layers]]


def model(settings: Settings) -> dict[str, Any]:
    norm, layers = decoder.norm(settings, 1e-6), decoder.depth(settings)
    mixer = decoder.attention(settings, bias=decoder.biases(settings), kv_heads=4, base=2000000.0)
    settings.get("max_window_layers")  # their class has no such setting, their release does
    turns, size = turning(settings, layers), settings.get("sliding_window")
    size = size if settings.get("use_sliding_window", False) else None
    seen = windows(settings, layers, size, [None if each else size for each in turns])
    ffn = decoder.glu(settings, bias=bool(settings.get("mlp_bias", False)))
    return decoder.model(settings, norm, mixer, [ffn] * layers, seen=seen, turning=turns, tied=True)


def config(section: dict[str, Any]) -> dict[str, Any]:
    blocks = blocks_of(section)
    found = decoder.config(section, "SmolLM3ForCausalLM", "smollm3") | decoder.window_config(section)
    return {
        **{key: value for key, value in found.items() if key != "max_window_layers"},
        **decoder.glu_config(blocks[0]["ffn"]),
        "layer_types": found.get("layer_types", ["full_attention"] * len(blocks)),
        "mlp_bias": blocks[0]["ffn"]["bias"],
        "no_rope_layers": [int(block["mixer"]["position"]["kind"] == "rope") for block in blocks],
    }


FAMILY = Family(
    architectures=("SmolLM3ForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
