"""The same choices, weights and gradients as the routers of transformers, on the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from shardforge.model.routers.topk import SelectionBias
from tests.tiny_routers import ALONE, B, H, S, router, sequence, sets, spread, tokens

EXPERTS = 16
V3 = {"score": "sigmoid", "groups": 4, "group_topk": 2, "scale": 2.5, "selection_bias": SelectionBias()}
V2 = {"weights": "raw", "scale": 16.0}
NAMES = {"num_experts_per_tok": 4, "num_local_experts": EXPERTS, "num_experts": EXPERTS, "hidden_size": H}
NAMES |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

CASES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "mixtral": (MixtralTopKRouter, {}, {}),
    "qwen3": (Qwen3MoeTopKRouter, {"norm_topk_prob": True}, {}),
    "qwen3-raw": (Qwen3MoeTopKRouter, {"norm_topk_prob": False}, {"weights": "raw"}),
    "gpt-oss": (GptOssTopKRouter, {}, {"order": "topk_first", "bias": True}),
    "deepseek-v2": (
        DeepseekV2TopkRouter,
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        V2 | {"groups": 4, "group_topk": 2, "group_score": "max"},
    ),
    "deepseek-v2-lite": (DeepseekV2TopkRouter, {"topk_method": "greedy", "routed_scaling_factor": 16.0}, V2),
    "deepseek-v3": (DeepseekV3TopkRouter, {"norm_topk_prob": True}, V3),
    "deepseek-v3-raw": (DeepseekV3TopkRouter, {"norm_topk_prob": False}, V3 | {"weights": "raw"}),
}


def pair(case: str, shift: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """Their router and ours with the same weights; biases are drawn around `shift`."""
    theirs, names, options = CASES[case]
    ours = router(experts=EXPERTS, k=4, dtype=torch.float32, **options)
    other = theirs(SimpleNamespace(**NAMES | names))
    generator = torch.Generator().manual_seed(1)
    other.weight.data.copy_(ours.weight.data)
    for mine, yours in (("bias", "bias"), ("selection_bias", "e_score_correction_bias")):
        if hasattr(other, yours):
            drawn = 0.3 * torch.randn(EXPERTS, generator=generator) + shift
            getattr(ours, mine).data.copy_(drawn)
            getattr(other, yours).data.copy_(drawn)
    return other, ours


def inputs() -> Tensor:
    return tokens().float()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_choices_and_weights_are_those_of_transformers(case, shift):
    theirs, ours = pair(case, shift)
    _, weight, expert = theirs(inputs().flatten(0, 1))
    routing = ours(inputs(), sequence(), ALONE)
    expert, weight = expert.view(B, S, -1), weight.view(B, S, -1)
    assert torch.equal(sets(routing.expert), sets(expert))
    torch.testing.assert_close(spread(routing), torch.zeros(B, S, EXPERTS).scatter(-1, expert, weight))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case):
    theirs, ours = pair(case)
    direction = torch.randn(B, S, EXPERTS, generator=torch.Generator().manual_seed(2))
    _, weight, expert = theirs(inputs().flatten(0, 1))
    (weight * direction.flatten(0, 1).gather(-1, expert)).sum().backward()
    (spread(ours(inputs(), sequence(), ALONE)) * direction).sum().backward()
    expected = {name: each.grad for name, each in theirs.named_parameters()}
    torch.testing.assert_close({name: each.grad for name, each in ours.named_parameters()}, expected)


def test_switch_is_that_of_transformers():
    ours = router("switch", k=1, experts=EXPERTS, dtype=torch.float32)
    names = {"expert_capacity": S, "router_bias": False, "router_jitter_noise": 0.0, "router_dtype": "float32"}
    theirs = SwitchTransformersTop1Router(SimpleNamespace(**NAMES | names, router_ignore_padding_tokens=False))
    theirs.classifier.weight.data.copy_(ours.weight.data)
    one_hot, chance, logits = theirs.eval()(inputs())
    routing = ours(inputs(), sequence(), ALONE)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(spread(routing), one_hot * chance)
