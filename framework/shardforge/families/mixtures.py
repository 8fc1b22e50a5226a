"""What families of mixtures of experts share: how their settings, their config.json and their tensors say experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from shardforge.families.decoder import OURS, THEIRS, WORDS
from shardforge.families.family import ACTIVATIONS
from shardforge.families.forms import EXPERTS
from shardforge.families.settings import Settings
from shardforge.families.table import Row, rows
from shardforge.model.balance import from_transformers

ROLES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Ours and theirs inside an expert, in most families."""


def count(settings: Settings) -> int:
    """Of experts, under the one or the other name that it has in config.json."""
    return int(settings.need("num_experts" if settings.get("num_local_experts") is None else "num_local_experts"))


def moe(settings: Settings, experts: int, inner: int, *, weights: str, coefficient: float) -> dict[str, Any]:
    """A mixture behind a softmax over all experts. `coefficient` is the architecture's own factor of the loss for even
    use of the experts; in transformers that loss counts only where output_router_logits says so."""
    k = settings.need("num_experts_per_tok")
    factor = settings.get("router_aux_loss_coef", coefficient)
    charged = settings.get("output_router_logits", False) and factor > 0
    if factor > 0 and not charged and settings.get("router_aux_loss_coef"):
        what = f"router_aux_loss_coef={factor}: without output_router_logits transformers charges no loss by it"
        settings.note(f"{what}, nor does the recipe")
    return {
        "kind": "moe",
        "experts": experts,
        "k": k,
        "inner": inner,
        "activation": settings.choose("hidden_act", ACTIVATIONS, "silu"),
        "router": {"kind": "topk", "score": "softmax", "weights": weights},
        "balance": [asdict(from_transformers(factor, k))] if charged else [],
    }


def moe_config(ffn: Mapping[str, Any]) -> dict[str, Any]:
    """What `moe` reads. Of several losses for even use the one that transformers has is kept."""
    pooled = [loss["weight"] for loss in ffn["balance"] if loss["scope"] == "layers"]
    return {
        "num_experts_per_tok": ffn["k"],
        "hidden_act": WORDS[ffn["activation"]],
        "output_router_logits": bool(pooled),
        **({"router_aux_loss_coef": pooled[0] / ffn["k"]} if pooled else {}),
    }


def expert_rows(block: str, router: str, roles: Mapping[str, str] = ROLES) -> tuple[Row, ...]:
    """Rows of experts that lie one by one in `block` of a layer, and of their router: "mlp", "mlp.gate"."""
    one = f"{THEIRS}.{block}.experts.{{expert}}"
    stacks = {f"{OURS}.ffn.experts.{mine}": f"{one}.{yours}.weight" for mine, yours in roles.items()}
    each = (Row((mine,), (yours,), EXPERTS, each="expert") for mine, yours in stacks.items())
    return (*rows({f"{OURS}.ffn.router": f"{THEIRS}.{router}"}), *each)
