"""DeepSeek-V2 and V2-Lite: latent attention, and mixtures of softmax routers with raw weights.

Paper: DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section 2; the classes of transformers and the released
    configurations for what the fields mean.
Limits: rotary channels turn in neighbouring pairs, and no field says otherwise: a model that turns the other ones is
    written with its rows in another order. `aux_loss_alpha` is the loss for even use inside each sequence (`seq_aux`)
    or the whole batch; only their own training code computes it.
"""

from __future__ import annotations

from typing import Any

from shardforge.families import decoder, deepseek
from shardforge.families.family import Family
from shardforge.families.section import layers
from shardforge.families.settings import Settings
from shardforge.families.table import Row, rows
from shardforge.families.turned import layouts, paired

GREEDY, LIMITED = "greedy", "group_limited_greedy"
NEIGHBOURS, HALVES = "interleaved", "half"


def model(settings: Settings) -> dict[str, Any]:
    section = deepseek.model(settings, router, dense=0, layout=NEIGHBOURS)
    weight = float(settings.get("aux_loss_alpha", 0.0))
    if weight and "moe" in section["blocks"]:
        scope = "sequence" if settings.get("seq_aux", True) else "batch"
        section["blocks"]["moe"]["ffn"]["balance"] = [{"scope": scope, "weight": weight}]
    return section


def router(settings: Settings) -> dict[str, Any]:
    settings.only("scoring_func", "softmax")
    settings.only("norm_topk_prob", False)
    settings.only("topk_method", GREEDY, LIMITED)
    found = {"kind": "topk", "weights": "raw", "scale": float(settings.get("routed_scaling_factor", 1.0))}
    if settings.get("topk_method", GREEDY) == LIMITED:
        kept = {"groups": settings.need("n_group"), "group_topk": settings.need("topk_group")}
        found |= kept | {"group_score": "max"}
    return found


def config(section: dict[str, Any]) -> dict[str, Any]:
    """KeyError for a model without mixtures: V3 says it, whichever channels turn together."""
    found = deepseek.config(section, "DeepseekV2ForCausalLM", "deepseek_v2", routed)
    if "n_routed_experts" not in found:
        raise KeyError("n_routed_experts")
    mixtures = [block["ffn"] for block in layers(section) if block["ffn"]["kind"] == "moe"]
    for loss in mixtures[0]["balance"][:1] if mixtures else ():
        found |= {"aux_loss_alpha": loss["weight"], "seq_aux": loss["scope"] == "sequence"}
    return found


def routed(router: dict[str, Any]) -> dict[str, Any]:
    found = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": router["scale"]}
    if router["groups"] is None:
        return found | {"topk_method": GREEDY}
    return found | {"topk_method": LIMITED, "n_group": router["groups"], "topk_group": router["group_topk"]}


def held(section: dict[str, Any]) -> dict[str, Any]:
    """The section whose weights `table` writes: the same model with neighbouring channels turning together."""
    return paired(section, NEIGHBOURS) if layouts(section) == {HALVES} else section


def table(section: dict[str, Any]) -> tuple[Row, ...]:
    moved = layouts(section) == {HALVES}
    return (*deepseek.block(section, decoder.OURS, decoder.THEIRS, paired=moved), *rows(decoder.TOP))


FAMILY = Family(
    architectures=("DeepseekV2ForCausalLM",),
    model=model,
    config=config,
    table=table,
    tied="lm_head.weight",
    spare=decoder.SPARE,
    held=held,
)
