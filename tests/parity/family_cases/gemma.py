"""Gemma 2 and 3, text alone; caps are tight and the factor on scores is large, so that they change something here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.parity.family_cases import Case

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 48,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    "query_pre_attn_scalar": 4,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
LINEAR = {"rope_type": "linear", "factor": 8.0}
DUAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
MIXED = ["full_attention", "sliding_attention", "full_attention"]


def made(kind: str, **changes: Any) -> Callable[[], Any]:
    def config() -> Any:
        import transformers

        return getattr(transformers, kind)(**SIZES | changes)

    return config


def as_released(folder: Path) -> None:
    """Gemma 3's first config.json: flat fields for positions, and a period in place of kinds of layers."""
    path = folder / "config.json"
    told = json.loads(path.read_text())
    positions, _ = told.pop("rope_parameters"), told.pop("layer_types")
    near, far = positions["sliding_attention"], positions["full_attention"]
    told |= {"rope_theta": far.pop("rope_theta"), "rope_local_base_freq": near.pop("rope_theta"), "rope_scaling": far}
    path.write_text(json.dumps(told | {"sliding_window_pattern": 2}))


CASES: dict[str, Case] = {
    "gemma2": Case(made("Gemma2Config", **CAPS)),
    "gemma2, untied, biases, no caps": Case(
        made(
            "Gemma2Config",
            tie_word_embeddings=False,
            attention_bias=True,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
        )
    ),
    "gemma2, untied and capped": Case(made("Gemma2Config", **CAPS, tie_word_embeddings=False)),
    "gemma2, other layers, scaled positions": Case(
        made("Gemma2Config", **CAPS, layer_types=MIXED, rope_parameters=LINEAR | {"rope_theta": 500.0})
    ),
    "gemma3": Case(made("Gemma3TextConfig", num_hidden_layers=7)),
    "gemma3, capped logits, positions of two kinds": Case(
        made("Gemma3TextConfig", final_logit_softcapping=2.5, layer_types=MIXED, rope_parameters=DUAL)
    ),
    "gemma3, untied, biases, one key head": Case(
        made("Gemma3TextConfig", tie_word_embeddings=False, attention_bias=True, num_key_value_heads=1)
    ),
    "gemma3, as first released": Case(
        made("Gemma3TextConfig", sliding_window_pattern=2, rope_parameters=DUAL), stored=as_released
    ),
}
