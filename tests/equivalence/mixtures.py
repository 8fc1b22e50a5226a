"""Tiny models of mixtures: what is counted over a batch, what a router remembers of it, and what chance it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardforge.core import slots
from tests.tiny import GLU, GQA, LENGTH
from tests.tiny_kinds import kind

MOE = {"kind": "moe", "experts": 8, "k": 2, "inner": 8}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 4, "mscale": 1.0, "mscale_all_dim": 0.7}
MLA = kind(slots.mixers, "mla") | {"position": {"kind": "rope", "layout": "interleaved", "scaling": YARN}}
MOVED = {"rate": {"start": 0.05, "then": [{"at": 0.5, "value": 0.02}]}}
SHARED = GLU | {"inner": 8}
TOLD_APART = {"model": {"embedding": {"kind": "learned", "length": LENGTH}}}
"""Where tokens compete: a document that begins with the same token twice has two of exactly equal affinities, and
rounding would choose between them."""


def balance(scope: str, **options: Any) -> list[dict[str, Any]]:
    return [{"scope": scope, "weight": 0.3, **options}]


DEEPSEEK: dict[str, Any] = {
    "mixer": MLA,
    "ffn": MOE
    | {
        "k": 4,
        "router": {
            "kind": "topk",
            "score": "sigmoid",
            "groups": 4,
            "group_topk": 2,
            "scale": 2.5,
            "selection_bias": MOVED | {"centered": True},
        },
        "shared": SHARED,
        "balance": balance("sequence"),
    },
}
"""DeepSeek-V3 in small, but with biases that move fast enough to change choices in two steps."""

OSS: dict[str, Any] = {
    "mixer": GQA | {"mask": {"kind": "window", "size": 5}, "sinks": "learned"},
    "ffn": MOE
    | {
        "bias": True,
        "clamp": 0.5,
        "router": {"kind": "topk", "order": "topk_first", "bias": True, "jitter": 0.3},
        "shared": SHARED,
        "shared_gate": "sigmoid",
        "capacity": {"factor": 1.0, "min": 1, "drop": "weight", "rounding": "ceil"},
        "balance": balance("batch") + balance("layers", counts="previous"),
        "z_loss": 0.1,
    },
} | TOLD_APART
"""gpt-oss in small, with everything that DEEPSEEK has not."""

CASES: Mapping[str, dict[str, Any]] = {
    "deepseek": DEEPSEEK,
    "oss": OSS,
    "v2-groups": {"ffn": MOE | {"router": {"kind": "topk", "groups": 4, "group_topk": 2, "group_score": "max"}}},
    "biases-and-room": {
        "ffn": MOE
        | {
            "router": {"kind": "topk", "score": "sqrt_softplus", "selection_bias": MOVED},
            "capacity": {"factor": 0.75, "eval_factor": 1.5, "min": 0},
        }
    },
    "layers": {"ffn": MOE | {"balance": balance("layers")}},
    "switch": {"ffn": MOE | {"k": 1, "router": "switch", "balance": balance("sequence")}},
    "noisy": {"ffn": MOE | {"router": {"kind": "noisy_topk", "sequences": 2}}},
    "choice": {"ffn": MOE | {"k": 8, "router": {"kind": "expert_choice", "leak": "allowed"}}} | TOLD_APART,
}
