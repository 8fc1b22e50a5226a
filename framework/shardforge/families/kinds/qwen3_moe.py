"""Qwen3-MoE: Qwen3 with mixtures in its layers, or in some of them.

Paper: Yang et al. 2025, "Qwen3 Technical Report", arXiv:2505.09388, section 2.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, mixtures
from shardforge.families.family import Family
from shardforge.families.section import layers as blocks_of
from shardforge.families.settings import Settings


def model(settings: Settings) -> dict[str, Any]:
    norm, layers = decoder.norm(settings, 1e-6), decoder.depth(settings)
    mixer = decoder.attention(settings, bias=decoder.biases(settings), qk_norm=norm, kv_heads=4)
    size = settings.given("sliding_window", 4096)
    size = size if settings.get("use_sliding_window", False) else None
    settings.get("max_window_layers")  # their class has no such setting: all layers have the window
    experts = mixtures.count(settings)
    weights = "renormalized" if settings.get("norm_topk_prob", False) else "raw"
    inner = settings.need("moe_intermediate_size")
    ffn = mixtures.moe(settings, experts, inner, weights=weights, coefficient=0.001)
    dense, step = settings.get("mlp_only_layers", []), decoder.period(settings, "decoder_sparse_step", 1)
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    plain = ffn if all(sparse) else decoder.glu(settings)
    settings.get("intermediate_size")  # of layers without experts, which there may be none of
    return decoder.model(settings, norm, mixer, [ffn if each else plain for each in sparse], seen=[size] * layers)


def config(section: dict[str, Any]) -> dict[str, Any]:
    ffns = [block["ffn"] for block in blocks_of(section)]
    ffn = next(each for each in ffns if each["kind"] == "moe")
    dense = [layer for layer, each in enumerate(ffns) if each["kind"] != "moe"]
    size = decoder.sizes(section)[0]
    return {
        **decoder.config(section, "Qwen3MoeForCausalLM", "qwen3_moe"),
        **mixtures.moe_config(ffn),
        "num_experts": ffn["experts"],
        "moe_intermediate_size": ffn["inner"],
        "intermediate_size": ffns[dense[0]]["inner"] if dense else ffn["inner"] * ffn["k"],
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "norm_topk_prob": ffn["router"]["weights"] == "renormalized",
        "use_sliding_window": size is not None,
        "sliding_window": size,
    }


FAMILY = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model=model,
    config=config,
    table=lambda section: decoder.table(section, decoder.PRE, mixtures.expert_rows("mlp", "mlp.gate")),
    held=decoder.held,
    tied="lm_head.weight",
    spare=decoder.SPARE,
)
