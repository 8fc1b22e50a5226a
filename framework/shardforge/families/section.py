"""The model section of a recipe as plain data: completed, taken apart by layer, compared by what it computes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from shardforge.model.scaling import stretched
from shardforge.recipe.build import build
from shardforge.recipe.model import ModelConfig
from shardforge.recipe.provenance import differences, plain
from shardforge.recipe.tree import Origin, wrap

STARTING = {"core", "init", "init_std", "evaluation"}
"""Fields of a model that trained weights make no difference of: how they started, and how attention is computed."""
TRAINING = {"dropout", "balance", "z_loss", "jitter", "rate", "centered"}
"""Fields that count in training alone."""


def config(section: Mapping[str, Any], origin: object) -> ModelConfig:
    """The section as a config. Problems of what is wrong in it are said to stand in `origin`."""
    return build(ModelConfig, wrap(dict(section), Origin(str(origin))))[0]


def whole(section: Mapping[str, Any], origin: object) -> dict[str, Any]:
    """The section with every field that it leaves out."""
    return plain(config(section, origin))


def layers(section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The block of each layer of a whole section, first to last."""
    return [section["blocks"][name] for name in config(section, "model").layers]


def tied(section: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding table again, be it bent or not."""
    head = section["head"]
    while head["kind"] == "softcap":
        head = head["head"]
    return bool(head["kind"] == "tied")


def apart(one: Mapping[str, Any], other: Mapping[str, Any], *, training: bool = False) -> list[tuple[str, Any, Any]]:
    """(field, left, right) of what two whole sections compute differently in evaluation, once for all layers; [] for
    the same. With `training` instead what they do differently in training alone."""
    found: dict[str, tuple[str, Any, Any]] = {}
    for field, left, right in differences(_by_layer(one), _by_layer(other)):
        parts = set(re.split(r"[.\[]", field))
        if STARTING.isdisjoint(parts) and training != TRAINING.isdisjoint(parts) and not _close(left, right):
            same = re.sub(r"^layers\.\d+", "layers", field)
            found.setdefault(same, (same, left, right))
    return list(found.values())


def _close(left: Any, right: Any) -> bool:
    """Whether two numbers differ by the rounding of one formula written in two ways."""
    return isinstance(left, float) and isinstance(right, float) and math.isclose(left, right, rel_tol=1e-14)


def _by_layer(section: Mapping[str, Any]) -> dict[str, Any]:
    """So that neither the names of blocks count nor how the stack is written."""
    blocks = {str(number): _meant(block) for number, block in enumerate(layers(section))}
    mtp = section.get("mtp")
    if mtp:
        blocks["mtp"] = _meant(section["blocks"][mtp["block"]])
        mtp = {key: value for key, value in mtp.items() if key not in ("block", "weight")}
    rest = {key: value for key, value in section.items() if key not in ("blocks", "stack", "mtp")}
    return {"layers": blocks, **rest, "mtp": mtp}


def _meant(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block with what an empty field stands for, and one of several words for the same."""
    mixer, ffn = dict(block["mixer"]), dict(block["ffn"])
    if mixer["kind"] == "gqa":
        mixer["kv_heads"] = mixer["kv_heads"] or mixer["heads"]
        mixer["scale"] = mixer["scale"] or mixer["head_dim"] ** -0.5
        mixer["position"] = _turned(mixer["position"], mixer["head_dim"])
        if mixer["qk_norm"] is None:
            del mixer["qk_norm_over"]
    elif mixer["kind"] == "mla":
        mixer["scale"] = mixer["scale"] or (mixer["qk_nope_head_dim"] + mixer["qk_rope_head_dim"]) ** -0.5
        mixer["position"] = _turned(mixer["position"], mixer["qk_rope_head_dim"])
    if ffn["kind"] == "moe" and ffn["router"]["kind"] == "topk":
        ffn["router"] = _chosen(ffn["router"])
    return {**block, "mixer": mixer, "ffn": ffn}


def _chosen(router: Mapping[str, Any]) -> dict[str, Any]:
    """A router whose softmax over the chosen logits is written as the renormalized softmax over all of them."""
    free = router["groups"] is None and router["selection_bias"] is None
    return {**router, "order": "score_first"} if router["order"] == "topk_first" and free else dict(router)


def plainer(position: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A position of heads of this width whose NTK scaling, if it has one, is written as the base that it means."""
    scaling = position.get("scaling")
    if scaling is None or scaling["kind"] != "ntk":
        return dict(position)
    turning = int(width * position["fraction"])
    return {**position, "base": stretched(position["base"], turning, scaling["factor"]), "scaling": None}


def _turned(position: Mapping[str, Any], width: int) -> dict[str, Any]:
    """A position in the plainest words, with YaRN's default factor as a number."""
    meant = plainer(position, width)
    scaling = meant.get("scaling")
    if scaling is None or scaling["kind"] != "yarn" or scaling["mscale"] is not None or scaling["attention_factor"]:
        return meant
    return {**meant, "scaling": {**scaling, "attention_factor": 0.1 * math.log(scaling["factor"]) + 1.0}}
