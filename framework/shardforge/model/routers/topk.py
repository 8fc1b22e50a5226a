"""The k experts with the largest affinities: softmax, sigmoid or sqrt(softplus), in any order, groups, biased choice.

Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538, eq. 3-5, without noise. Renormalized
    softmax is Mixtral, arXiv:2401.04088, eq. 2.1; groups are DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, section
    2.2.2 (group_score: max), and "DeepSeek-V3 Technical Report", arXiv:2412.19437, eq. 13-16 (top_sum, sigmoid and the
    bias on the choice, which is Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664).
Changes: a = score(x W^T + bias); c = a + selection_bias; outside the group_topk best of `groups` equal parts c becomes
    -inf; the k largest c are chosen; weights are their a, over their sum when renormalized, times scale. topk_first:
    c and a are the logits, and weights the softmax over the chosen ones. After each step selection_bias moves by rate
    towards experts with less than the mean load of the whole batch. Of equal c the lower expert wins.
Cost: hidden * experts weights, and experts with a bias. The choice takes as long as torch.topk, with a selection bias
    and a balance loss of scope sequence twice; jitter draws a number for each channel of each token.
Limits: with k = 1 renormalized makes every weight 1, and the router learns from the balance and z losses alone. Groups
    bound the nodes that a token reaches only where ep puts whole groups on each node. The selection bias has no
    gradient and no decay; it moves after updates alone, and rate: 0.0 holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.errors import Problems, RecipeError
from shardforge.core.options import option
from shardforge.core.phases import Phases, value_at
from shardforge.core.slots import routers
from shardforge.model.context import BuildContext
from shardforge.model.groups import GroupScore, highest, limited
from shardforge.model.routing import TINY, Logits, Routing, numbered, salt, wide
from shardforge.nn import counter
from shardforge.nn.init import normal
from shardforge.nn.module import Init, local
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + e^x)); where softplus underflows its root would have an infinite slope."""
    return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()


SCORES: Mapping[Score, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}


@dataclass(frozen=True, kw_only=True)
class SelectionBias:
    rate: float | Phases = option(
        1e-3, "how far the bias of an expert moves after a step; DeepSeek-V3 ends with 0", at_least=0
    )
    centered: bool = option(False, "each move is made to add up to 0 over the experts; no choice depends on it")


@routers.register("topk")
@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    score: Score = option("softmax", "affinity of a token and an expert, from their logit")
    order: Literal["score_first", "topk_first"] = option(
        "score_first", "score_first: chosen by affinity; topk_first: chosen by logit, softmax over the chosen alone"
    )
    weights: Literal["renormalized", "raw"] = option(
        "renormalized", "renormalized: the weights of a token add up to `scale`; raw: they are its affinities * scale"
    )
    scale: float = option(1.0, "factor on the weights; DeepSeek-V3 takes 2.5", above=0)
    bias: bool = option(False, "a learned bias on the logits, as gpt-oss has; the z-loss does not see it")
    jitter: float = option(
        0.0, "in training x is multiplied by uniform numbers from 1 - jitter to 1 + jitter", at_least=0, at_most=0.99
    )
    groups: int | None = option(None, "equal parts of the experts, side by side, from which few are kept", at_least=1)
    group_topk: int | None = option(None, "groups that are kept for a token", at_least=1)
    group_score: GroupScore = option(
        "top_sum", "worth of a group: top_sum adds its k / group_topk largest (DeepSeek-V3), max takes one (V2)"
    )
    selection_bias: SelectionBias | None = option(
        None, "a bias on the choice alone, moved after each step towards even loads"
    )
    init_std: float | None = option(None, "standard deviation of W at the start; empty means model.init", above=0)

    def check(self, experts: int, k: int) -> None:
        problems = [*self._order_problems(), *self._group_problems(experts, k)]
        if problems:
            raise Problems(problems)

    def _order_problems(self) -> list[RecipeError]:
        problems = []
        if self.order == "topk_first" and self.score != "softmax":
            what = f"order: topk_first takes the softmax over the chosen logits, so score={self.score} means nothing"
            problems.append(RecipeError(what, "router", "score: softmax, or order: score_first"))
        if self.order == "topk_first" and self.weights == "raw":
            what = "order: topk_first gives weights that add up to 1, so there are no raw ones"
            problems.append(RecipeError(what, "router", "weights: renormalized, or order: score_first"))
        return problems

    def _group_problems(self, experts: int, k: int) -> list[RecipeError]:
        groups, kept = self.groups, self.group_topk
        if groups is None and kept is None:
            return []
        if groups is None or kept is None:
            what = f"groups={groups} and group_topk={kept}: one does nothing without the other"
            return [RecipeError(what, "router", "give both, or leave both out")]
        if experts % groups:
            fit = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            what = f"groups={groups} does not divide experts={experts}"
            return [RecipeError(what, "router", f"groups must be one of {fit}")]
        if kept > groups:
            return [RecipeError(f"group_topk={kept} of groups={groups} cannot be kept", "router", f"at most {groups}")]
        room = kept * (experts // groups)
        if k > room:
            least = -(-k * groups // experts)
            what = f"k={k} of the {room} experts in group_topk={kept} of groups={groups} cannot be chosen"
            return [RecipeError(what, "router", f"group_topk: {least}" if least <= groups else f"k: at most {room}")]
        if self.group_score == "top_sum" and k % kept:
            what = f"group_score: top_sum adds k/group_topk of a group, and group_topk={kept} does not divide k={k}"
            fit = ", ".join(str(n) for n in range(1, groups + 1) if k % n == 0)
            return [RecipeError(what, "router", f"group_topk must be one of {fit}; or group_score: max")]
        return []

    def build(self, ctx: BuildContext, experts: int, k: int) -> TopK:
        return TopK(self, ctx, experts, k, None if self.init_std is None else normal(self.init_std))


class TopK(Logits):
    def __init__(self, cfg: TopKConfig, ctx: BuildContext, experts: int, k: int, init: Init | None = None):
        cfg.check(experts, k)
        super().__init__(experts, ctx, init, cfg.bias)
        self.cfg, self.k, self.salt = cfg, k, salt("jitter", ctx.layer)
        if cfg.selection_bias is not None:
            self.remember("selection_bias", Dim("router", experts))

    def forward(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:  # [b, s/parts, h]
        cfg = self.cfg
        logits = self.logits(self.jittered(x, seq, split))
        moved = logits + local(self.bias).to(logits.dtype) if cfg.bias else logits
        affinity = SCORES[cfg.score](moved)
        compared = moved if cfg.order == "topk_first" else affinity
        scores = compared.detach()
        expert = self.chosen(scores)
        weight = compared.gather(-1, expert)
        if cfg.order == "topk_first":
            weight = weight.softmax(-1)
        elif cfg.weights == "renormalized":
            weight = weight / (weight.sum(-1, keepdim=True) + TINY)
        shares = affinity if cfg.score == "softmax" else affinity / (affinity.sum(-1, keepdim=True) + TINY)
        return Routing(expert, weight * cfg.scale, shares, logits, None if cfg.selection_bias is None else scores)

    def chosen(self, scores: Tensor) -> Tensor:
        """scores [b, s, e] -> the experts [b, s, k]."""
        cfg, choice = self.cfg, scores
        if cfg.selection_bias is not None:
            choice = scores + self.selection_bias
        if cfg.groups is not None:
            choice = limited(choice, cfg.groups, cfg.group_topk, cfg.group_score, self.k // cfg.group_topk)
        return highest(choice, self.k)

    def jittered(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Tensor:
        """x in float32 at least, in training times its random numbers: on any layout the same for a token."""
        x = wide(x)
        if self.cfg.jitter == 0.0 or seq.key is None:
            return x
        drawn = counter.uniform(seq.key ^ self.salt, numbered(seq, split, x.shape[-1]), x.dtype)
        return x * (1 + self.cfg.jitter * (2 * drawn - 1))

    @torch.no_grad()
    def settle(self, loads: Mapping[int, Tensor], progress: float) -> None:
        """Move the selection bias, after a step in which this layer's experts had `loads[layer]` [e] tokens."""
        if (bias := self.cfg.selection_bias) is None:
            return
        load = loads[self.layer]
        move = (load.mean() - load).sign()
        if bias.centered:
            move = move - move.mean()
        self.selection_bias += (value_at(bias.rate, progress) * move).to(self.selection_bias)
