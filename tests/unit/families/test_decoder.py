from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardforge.core.errors import Problems
from shardforge.families import decoder
from shardforge.families.family import families
from shardforge.families.publish import Published, publish
from shardforge.families.section import whole
from shardforge.families.settings import Settings
from shardforge.families.statemap import StateMap
from shardforge.families.turned import layouts
from shardforge.model.build import build
from shardforge.nn.sequence import Sequence
from tests.tiny import tiny

NORM = {"kind": "rmsnorm", "eps": 1e-5}
VOCAB, LENGTH = 16, 9
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": "all"},
    "norms over a head": {"qk_norm": NORM},
    "norms over all heads": {"qk_norm": NORM, "qk_norm_over": "all"},
    "as many key heads": {"kv_heads": None},
}


def section(mixer: dict[str, Any], layout: str = "interleaved", **top: Any) -> dict[str, Any]:
    position = {"kind": "rope", "base": 50.0, "layout": layout}
    block = {
        "mixer": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "position": position, **mixer},
        "ffn": {"kind": "glu", "inner": 20},
        "residual": {"kind": "res_post" if "qk_norm_over" in mixer else "pre", "norm": NORM},
    }
    told = {"vocab": VOCAB, "hidden": 32, "blocks": {"dense": block}, "stack": ["dense x 2"], "norm": NORM, **top}
    return whole(told, "the test")


def model(told: dict[str, Any]) -> nn.Module:
    recipe = tiny(model=told)
    made = build(recipe.model, recipe.objective.build(), torch.float64)
    made.to_empty(device="cpu")
    return made.eval()


def logits(made: nn.Module) -> Tensor:
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) % VOCAB
    positions = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        return made(tokens, Sequence(positions, torch.zeros_like(positions), torch.arange(2)))


def weights(made: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: weight.shape for name, weight in made.named_parameters()}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) / 4 for name, shape in shapes.items()}


def reread(ours: dict[str, Tensor], told: dict[str, Any], said: Published) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The model that a family's reader makes of what its table writes."""
    shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
    theirs = dict(StateMap(said.family.table(told), shapes).to(ours.__getitem__))
    again = whole(said.family.model(Settings(said.config, Path("config.json"))), "config.json")
    return again, dict(StateMap(said.family.table(again), shapes).back(theirs.__getitem__))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_neighbouring_channels_turn_is_written_as_one_whose_halves_do(name):
    told = section(MODELS[name])
    made = model(told)
    ours = weights(made)
    made.load_state_dict(ours)
    again, back = reread(ours, told, publish(told, "the test"))
    other = model(again)
    other.load_state_dict(back)
    assert layouts(again) == {"half"}
    assert torch.allclose(logits(made), logits(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_such_a_model_comes_back_from_the_table_that_wrote_it(name):
    told = section(MODELS[name])
    ours = weights(model(told))
    shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
    map = StateMap(publish(told, "the test").family.table(told), shapes)
    theirs = dict(map.to(ours.__getitem__))
    back = dict(map.back(theirs.__getitem__))
    assert all(torch.equal(back[name], weight) for name, weight in ours.items())


def test_a_model_whose_halves_turn_is_written_as_it_is():
    told = section({}, "half")
    assert decoder.held(told) is told
    assert decoder.table(told, decoder.PRE) == decoder.rows(decoder.names(decoder.PRE))


SIZES = {
    **{"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2},
    **{"vocab_size": 48, "intermediate_size": 40, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
}
OWN = {
    "GPT2LMHeadModel": {
        "n_embd": 24,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 64,
        **dict.fromkeys(SIZES),
        "vocab_size": 48,
    },
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OlmoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "other": 1}}, "other is not a field"),
    ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
    (
        "LlamaForCausalLM",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
        "8",
    ),
    ("LlamaForCausalLM", {"sliding_window": 8}, "sliding_window=8"),
    ("LlamaForCausalLM", {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ("GPT2LMHeadModel", {"n_layer": 10**12}, "n_layer is 1000000000000"),
    ("LlamaForCausalLM", {"head_dim": 8, "num_attention_heads": 5}, "num_attention_heads=5"),
    ("MistralForCausalLM", {"attention_bias": True}, "attention_bias=True"),
    ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, "layer_types="),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window is set"),
    ("Qwen3ForCausalLM", {"quantization": {"bits": 4}}, "quantization="),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries"),
    ("MixtralForCausalLM", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("OlmoeForCausalLM", {"head_dim": 8}, "head_dim=8"),
    ("Olmo2ForCausalLM", {"hidden_act": "xielu"}, "hidden_act='xielu'"),
    ("Qwen3MoeForCausalLM", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
]


@pytest.mark.parametrize(("architecture", "told", "named"), REFUSED)
def test_a_setting_that_would_be_another_model_is_refused_by_name(architecture, told, named):
    settings = Settings(SIZES | OWN.get(architecture, {}) | told, Path("config.json"))
    families()[architecture].model(settings)
    with pytest.raises(Problems) as caught:
        settings.settle()
    assert [problem for problem in caught.value.problems if named in problem.what]


@pytest.mark.parametrize("architecture", sorted({name for name, _, _ in REFUSED}))
def test_without_it_nothing_is_refused(architecture):
    settings = Settings(SIZES | OWN.get(architecture, {}), Path("config.json"))
    families()[architecture].model(settings)
    settings.settle()
