"""Rates and factors of our scalings are those that the transformers library computes from the published configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardforge.model.positions.rope import RopeConfig
from shardforge.recipe.load import from_mapping
from tests.parity.models import position
from tests.tiny import GQA, mapping

pytest.importorskip("transformers", reason="the transformers package is the reference")

TOLERANCE = 2e-6  # their tables are made in float32
GPT_OSS = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
DEEPSEEK = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
LLAMA |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "linear": ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, 128),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}, 128),
    "llama-3.1": (LLAMA | {"factor": 8.0}, 128),
    "llama-3.2": (LLAMA | {"factor": 32.0}, 64),
    "qwen-yarn": (YARN, 128),
    "yarn-with-its-own-factor": (YARN | {"attention_factor": 1.3}, 128),
    "gpt-oss": (GPT_OSS | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}, 64),
    "deepseek-v2": (DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 0.707}, 64),
    "deepseek-v2-unequal": (DEEPSEEK | {"mscale": 0.707, "mscale_all_dim": 1.0}, 64),
    "deepseek-v3": (DEEPSEEK | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}, 64),
}
"""Name -> rope_parameters of the config, width of a head."""
TRAINED = 2048


@pytest.mark.parametrize("length", [100, TRAINED, 4 * TRAINED])
@pytest.mark.parametrize("name", PUBLISHED)
def test_rates_and_the_factor_on_cos_and_sin_are_the_published_ones(name, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, width = PUBLISHED[name]
    shape = {"hidden_size": 4 * width, "num_attention_heads": 4, "head_dim": width}
    config = LlamaConfig(**shape, max_position_embeddings=TRAINED, rope_parameters=dict(rope))
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, seq_len=length)

    ours = position(rope)
    if name == "dynamic":
        ours["scaling"]["original_length"] = TRAINED
    cfg: RopeConfig = from_mapping(mapping(mixer=GQA | {"position": ours})).recipe.model.blocks["one"].mixer.position
    made = cfg.build(width)
    torch.testing.assert_close(made.rates(length), expected.double(), rtol=TOLERANCE, atol=0)
    assert made.amplitude == pytest.approx(factor, rel=1e-12)
