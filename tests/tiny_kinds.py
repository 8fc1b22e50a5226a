"""Tiny configs of every registered kind, made from the registry: a new kind is tested without being mentioned."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardforge.core import slots
from shardforge.core.options import REQUIRED
from shardforge.core.slots import Slot
from tests.tiny import GLU, GQA

MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 24}

VALUES: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 4, "inner": 24, "size": 5, "length": 16, "lr": 0.01}
VALUES |= {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
VALUES |= {"experts": 4, "k": 2}
"""What a required field of a kind is in a tiny model, by its name."""


def kind(slot: Slot, name: str) -> dict[str, Any]:
    """The smallest recipe text of one kind: its name and its required fields."""
    fields = dataclasses.fields(slot[name])
    required = [f.name for f in fields if f.default is REQUIRED and f.default_factory is REQUIRED]
    return {"kind": name, **{field: VALUES[field] for field in required}}


def variants() -> dict[str, dict[str, Any]]:
    """Name -> changes to the tiny recipe: one for every kind of every slot of a model."""
    model = {"embedding": slots.embeddings, "norm": slots.norms, "head": slots.heads}
    block = {"mixer": slots.mixers, "ffn": slots.ffns, "residual": slots.residuals}
    out: dict[str, dict[str, Any]] = {}
    for name, slot in model.items():
        out |= {f"{name}-{each}": {"model": {name: kind(slot, each)}} for each in slot.kinds()}
    for name, slot in block.items():
        out |= {f"{name}-{each}": {name: kind(slot, each)} for each in slot.kinds()}
    for name, slot in {"position": slots.positions, "mask": slots.masks}.items():
        out |= {f"{name}-{each}": {"mixer": GQA | {name: kind(slot, each)}} for each in slot.kinds()}
    for each in slots.norms.kinds():
        out[f"residual-norm-{each}"] = {"residual": {"kind": "pre", "norm": kind(slots.norms, each)}}
        for over in ("head", "all"):
            out[f"qk-norm-{over}-{each}"] = {"mixer": GQA | {"qk_norm": kind(slots.norms, each), "qk_norm_over": over}}
    for each in slots.routers.kinds():
        out[f"router-{each}"] = {"ffn": MOE | {"router": kind(slots.routers, each)}}
    for each in slots.objectives.kinds():
        out[f"objective-{each}"] = {"objective": kind(slots.objectives, each)}
    return out


OPTIONS: dict[str, dict[str, Any]] = {
    "grouped-heads": {"mixer": GQA | {"heads": 8}},
    "all-biases": {"mixer": GQA | {"bias": "all"}, "ffn": GLU | {"bias": True}},
    "mlp-relu2-bias": {"ffn": {"kind": "mlp", "inner": 24, "activation": "relu2", "bias": True}},
    "half-rope": {"mixer": GQA | {"position": {"kind": "rope", "fraction": 0.5}}},
    "offset-norm": {"residual": {"kind": "sandwich", "norm": {"kind": "rmsnorm", "offset": 1.0}}},
    "post-norm": {"residual": {"kind": "post", "norm": "layernorm"}, "model": {"norm": "none"}},
    "scaled-embedding-tied": {"model": {"embedding": {"kind": "token", "scale": 4.0}, "head": "tied"}},
    "z-loss-softcap": {
        "objective": {"kind": "next_token", "z_loss": 0.1},
        "model": {"head": {"kind": "softcap", "cap": 5.0}},
    },
    "moe-shared-limited": {"ffn": MOE | {"shared": GLU, "capacity": 1.0, "balance": 0.1, "z_loss": 0.01}},
    "moe-sigmoid-raw": {"ffn": MOE | {"router": {"kind": "sigmoid", "over": "none", "scale": 2.5}, "balance": 0.1}},
    "dropout": {"residual": {"kind": "pre", "dropout": 0.3}, "model": {"dropout": 0.2}},
    "eager-core": {"model": {"core": "eager"}},
    "two-blocks": {
        "model": {
            "blocks": {
                "near": {"mixer": GQA | {"mask": {"kind": "window", "size": 4}}, "ffn": GLU},
                "far": {"mixer": GQA | {"position": "nope"}, "ffn": {"kind": "mlp", "inner": 32}},
            },
            "stack": ["near x 2", "far"],
        }
    },
}
"""Options of kinds, and kinds together, that the variants above do not reach."""
