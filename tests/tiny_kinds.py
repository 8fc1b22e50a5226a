"""Tiny configs of every registered kind, made from the registry: a new kind is tested without being mentioned."""

from __future__ import annotations

import dataclasses
from typing import Any

from shardforge.core import slots
from shardforge.core.options import REQUIRED
from shardforge.core.slots import Slot
from tests.tiny import GLU, GQA

MOE = {"kind": "moe", "experts": 4, "k": 2, "inner": 24}
EVEN = [{"scope": "sequence", "weight": 0.1}]
EVERYWHERE = [*EVEN, {"scope": "batch", "weight": 0.2}, {"scope": "layers", "weight": 0.3, "counts": "previous"}]
TIGHT = {"factor": 1.0, "min": 1, "rounding": "ceil"}

RAW = {"kind": "topk", "score": "sigmoid", "weights": "raw"}

VALUES: dict[str, Any] = {"heads": 4, "kv_heads": 4, "head_dim": 4, "inner": 24, "size": 5, "length": 16, "lr": 0.01}
VALUES |= {"kv_lora_rank": 6, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5}
VALUES |= {"experts": 4, "k": 2}
VALUES |= {"factor": 4.0, "original_length": 16}
"""What a required field of a kind is in a tiny model, by its name."""


CHOICES = {"switch": 1}
"""Experts a token goes through, where a kind of router leaves no choice."""

LEAKING = {"expert_choice"}
"""Kinds of router that a causal model refuses; their own tests know them."""


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
    for each in slots.rope_scalings.kinds():
        out[f"scaling-{each}"] = {
            "mixer": GQA | {"position": {"kind": "rope", "scaling": kind(slots.rope_scalings, each)}}
        }
    for each in slots.norms.kinds():
        out[f"residual-norm-{each}"] = {"residual": {"kind": "pre", "norm": kind(slots.norms, each)}}
        for over in ("head", "all"):
            out[f"qk-norm-{over}-{each}"] = {"mixer": GQA | {"qk_norm": kind(slots.norms, each), "qk_norm_over": over}}
    for each in sorted(slots.routers.kinds().keys() - LEAKING):
        out[f"router-{each}"] = {"ffn": MOE | {"router": kind(slots.routers, each), "k": CHOICES.get(each, MOE["k"])}}
    for each in slots.objectives.kinds():
        out[f"objective-{each}"] = {"objective": kind(slots.objectives, each)}
    return out


SINKS = GQA | {"heads": 8, "sinks": "learned"}

OPTIONS: dict[str, dict[str, Any]] = {
    "grouped-heads": {"mixer": GQA | {"heads": 8}},
    "all-biases": {"mixer": GQA | {"bias": "all"}, "ffn": GLU | {"bias": True}},
    "mlp-relu2-bias": {"ffn": {"kind": "mlp", "inner": 24, "activation": "relu2", "bias": True}},
    "half-rope": {"mixer": GQA | {"position": {"kind": "rope", "fraction": 0.5}}},
    "interleaved-rope": {"mixer": GQA | {"position": {"kind": "rope", "layout": "interleaved"}}},
    "absorbed-latents": {"mixer": kind(slots.mixers, "mla") | {"evaluation": "absorbed"}},
    "offset-norm": {"residual": {"kind": "sandwich", "norm": {"kind": "rmsnorm", "offset": 1.0}}},
    "post-norm": {"residual": {"kind": "post", "norm": "layernorm"}, "model": {"norm": "none"}},
    "scaled-embedding-tied": {"model": {"embedding": {"kind": "token", "scale": 4.0}, "head": "tied"}},
    "z-loss-softcap": {
        "objective": {"kind": "next_token", "z_loss": 0.1},
        "model": {"head": {"kind": "softcap", "cap": 5.0}},
    },
    "moe-shared-limited": {
        "ffn": MOE | {"shared": GLU, "shared_gate": "sigmoid", "capacity": TIGHT, "balance": EVEN, "z_loss": 0.01}
    },
    "moe-clamped-biases": {"ffn": MOE | {"bias": True, "clamp": 7.0, "balance": EVERYWHERE}},
    "moe-mlp-experts": {"ffn": MOE | {"form": "mlp", "activation": "relu2", "bias": True, "capacity": TIGHT}},
    "moe-sigmoid-raw": {"ffn": MOE | {"router": RAW | {"scale": 2.5}, "balance": EVEN}},
    "dropout": {"residual": {"kind": "pre", "dropout": 0.3}, "model": {"dropout": 0.2}},
    "eager-core": {"model": {"core": "eager"}},
    "sinks": {
        "model": {
            "blocks": {
                "near": {"mixer": SINKS | {"mask": {"kind": "window", "size": 4}}, "ffn": GLU},
                "far": {"mixer": SINKS, "ffn": GLU},
            },
            "stack": ["near", "far"],
        }
    },
    "capped-scores": {"mixer": GQA | {"heads": 8, "softcap": 0.7}},
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
