"""Tiny models of DeepSeek's architectures as folders that a release could be, made without any other library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shardforge.checkpoint import state
from shardforge.families.publish import publish
from shardforge.families.section import config, whole
from shardforge.families.statemap import StateMap
from shardforge.model.build import build
from shardforge.model.decoder import Decoder

NORM = {"kind": "rmsnorm", "eps": 1e-5}
SOFTMAX = {"kind": "topk", "weights": "raw", "scale": 4.0}
SIGMOID = {"kind": "topk", "score": "sigmoid", "scale": 2.5, "selection_bias": {}}
MTP = {"depth": 2, "block": "moe", "hidden": "after_norm", "norm": NORM, "weight": 1.0}


def section(
    router: Mapping[str, Any] = SIGMOID, mtp: Mapping[str, Any] | None = None, layout: str = "interleaved", **mixer: Any
) -> dict[str, Any]:
    """A whole model section: one dense layer and two mixtures. `mixer` replaces fields of the attention."""
    position = {"kind": "rope", "layout": layout}
    latent = {"kind": "mla", "heads": 3, "q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4}
    latent |= {"qk_rope_head_dim": 6, "v_head_dim": 3, "position": position, "norm": {"kind": "rmsnorm", "eps": 1e-6}}
    shared = {"mixer": latent | mixer, "residual": {"kind": "pre", "norm": NORM}}
    moe = {"kind": "moe", "experts": 4, "k": 2, "inner": 5, "router": router, "shared": {"kind": "glu", "inner": 10}}
    return whole(
        {
            "vocab": 32,
            "hidden": 12,
            "blocks": {
                "dense": shared | {"ffn": {"kind": "glu", "inner": 20}},
                "moe": shared | {"ffn": moe},
            },
            "stack": ["dense", "moe x 2"],
            "norm": NORM,
            "mtp": mtp,
            "core": "eager",
        },
        "tiny",
    )


def shapes(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    built = build(config(model, "tiny"), nn.Identity())
    return {name: tuple(each["shape"]) for name, each in state.table(built).items()}


def weights(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """A random tensor for every name, none like another."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes(model).items()}


def released(model: Mapping[str, Any], ours: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors that say the model."""
    published = publish(model, "tiny")
    mapped = StateMap(published.family.table(dict(model)), shapes(model))
    return published.config, {name: each.clone() for name, each in mapped.to(lambda name: ours[name])}


def written(folder: Path, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(told))
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


def decoder(model: Mapping[str, Any], ours: Mapping[str, Tensor], objective: nn.Module | None = None) -> Decoder:
    built = build(config(model, "tiny"), objective or nn.Identity()).to_empty(device="cpu")
    built.load_state_dict(dict(ours))
    return built.eval()
