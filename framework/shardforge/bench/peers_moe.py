"""One mixture-of-experts layer in other libraries, for bench/moe.py: sizes, weights, and what each of them is given.

transformers' Qwen3-MoE block in the implementations of its experts, and torchtitan's MoE. OLMo-core's layers are not
here: both move tokens with kernels that need a GPU (Triton, and transformer_engine in the newer one).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor, nn

from shardforge.core.optional import require

Pick = Callable[[nn.Parameter], Tensor]
BATCHED = "batched_mm"


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    inner: int
    experts: int = 64
    k: int = 6

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.inner}"


@dataclass(frozen=True)
class Contestant:
    """One layer of one library.

    `call` maps x [1, t, h] to [1, t, h]. `views` shows what `pick` takes of each weight, itself or its gradient, under
    the same names and shapes for all: router [e, h], gate and up [e, h, f], down [e, f, h].
    """

    name: str
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    views: Callable[[Pick], dict[str, Tensor]]

    @torch.no_grad()
    def take(self, weights: dict[str, Tensor]) -> None:
        for name, view in self.views(lambda weight: weight.data).items():
            view.copy_(weights[name])

    def gradients(self) -> dict[str, Tensor]:
        return self.views(given)


def given(weight: nn.Parameter) -> Tensor:
    if weight.grad is None:
        raise RuntimeError("a weight got no gradient")
    return weight.grad


def transformers(sizes: Sizes, dtype: torch.dtype, implementation: str) -> Contestant:
    require("transformers", for_="bench moe", extra="hf")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=sizes.hidden,
        moe_intermediate_size=sizes.inner,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config).to(dtype)

    def views(pick: Pick) -> dict[str, Tensor]:
        gate, up = pick(block.experts.gate_up_proj).transpose(1, 2).chunk(2, -1)
        down = pick(block.experts.down_proj).transpose(1, 2)
        return {"router": pick(block.gate.weight), "gate": gate, "up": up, "down": down}

    return Contestant(f"transformers {implementation}", block, block, views)


def torchtitan(sizes: Sizes, dtype: torch.dtype) -> Contestant:
    fix = "pip install torchtitan==0.3.0 triton, and what the message names"
    found = require("torchtitan.models.common.moe", for_="bench moe --peers", fix=fix)
    linear = require("torchtitan.models.common.linear", for_="bench moe --peers", fix=fix)
    e, k = sizes.experts, sizes.k
    module = found.MoE.Config(
        num_experts=e,
        load_balance_coeff=None,
        routed_experts=found.RoutedExperts.Config(
            inner_experts=found.GroupedExperts.Config(dim=sizes.hidden, hidden_dim=sizes.inner, num_experts=e),
            token_dispatcher=found.LocalTokenDispatcher.Config(num_experts=e, top_k=k),
        ),
        router=found.TokenChoiceTopKRouter.Config(
            num_experts=e,
            gate=linear.Linear.Config(in_features=sizes.hidden, out_features=e),
            top_k=k,
            score_func="softmax",
            route_norm=True,
        ),
    ).build()
    module.to(dtype)
    module.tokens_per_expert_E = torch.zeros(e)  # counts stay in float32
    experts = module.routed_experts.inner_experts

    def views(pick: Pick) -> dict[str, Tensor]:
        names = {"gate": experts.w1_EFD, "up": experts.w3_EFD, "down": experts.w2_EDF}
        return {name: pick(weight).transpose(1, 2) for name, weight in names.items()} | {
            "router": pick(module.router.gate.weight)
        }

    return Contestant("torchtitan", module, module, views)


def peers(sizes: Sizes, dtype: torch.dtype, *, more: bool, tell: Callable[[str], None]) -> list[Contestant]:
    """All that can run here; with `more` also torchtitan. What cannot is told, with the reason."""
    implementations = ["eager", "grouped_mm"]
    size = torch.finfo(dtype).bits // 8
    copied = 3 * sizes.tokens * sizes.k * sizes.hidden * sizes.inner * size  # of weights, and again of their gradients
    if 2 * copied < psutil.virtual_memory().available / 2:
        implementations.append(BATCHED)
    else:
        tell(f"not run: transformers {BATCHED} copies each token's experts, {2 * copied / 1e9:.0f} GB")
    found = [transformers(sizes, dtype, each) for each in implementations]
    if more and dtype == torch.bfloat16:
        found.append(torchtitan(sizes, dtype))
    elif more:
        tell("not run: torchtitan, whose experts compute in bf16 from weights of any type")
    return found
