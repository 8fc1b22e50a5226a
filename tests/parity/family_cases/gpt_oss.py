"""gpt-oss; limits of the units are tight, so that they limit something here."""

from __future__ import annotations

from collections.abc import Callable
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
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "swiglu_limit": 0.5,
    "sliding_window": 4,
    "pad_token_id": None,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "truncate": False,
}
KINDS = ["full_attention", "sliding_attention", "full_attention"]


def made(**changes: Any) -> Callable[[], Any]:
    def config() -> Any:
        from transformers import GptOssConfig

        return GptOssConfig(**SIZES | {"rope_parameters": YARN} | changes)

    return config


CASES: dict[str, Case] = {
    "gpt-oss": Case(made()),
    "gpt-oss, tied, no biases, other layers": Case(
        made(tie_word_embeddings=True, attention_bias=False, layer_types=KINDS)
    ),
    "gpt-oss, plain positions, charged for uneven use": Case(
        made(
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            output_router_logits=True,
            router_aux_loss_coef=0.02,
        )
    ),
    "gpt-oss, one expert a token, no windows": Case(
        made(num_experts_per_tok=1, layer_types=["full_attention"] * 3, num_key_value_heads=1)
    ),
}
