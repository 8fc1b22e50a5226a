"""Experts choose tokens: each takes the same number from every document, and a token goes through few or many.

Paper: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", arXiv:2202.09368, eq. 1-2.
Changes: S = softmax(x W^T) over the experts; each expert takes the floor(capacity * n / experts), but at least 1, of
    the n tokens of a document with the largest S for it, of equals the first; weights are S. Padding is not taken.
Cost: hidden * experts weights, and a sort of each expert's affinities along the sequence.
Limits: whether a token is taken depends on later tokens of its document, so a causal model sees its future in training
    and cannot be sampled from; all models here are causal, so the kind is refused without leak: allowed. The k of the
    mixture is the number of experts, because one token may go through all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shardforge.core.errors import Problems, RecipeError
from shardforge.core.options import option
from shardforge.core.slots import routers
from shardforge.model.context import BuildContext
from shardforge.model.routing import Logits, Routing
from shardforge.nn.batch import PADDING
from shardforge.nn.dispatch import NOWHERE, count
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit


@routers.register("expert_choice")
@dataclass(frozen=True, kw_only=True)
class ExpertChoiceConfig:
    capacity: float = option(2.0, "experts that a token goes through on average", above=0)
    leak: Literal["refused", "allowed"] = option("refused", "whether a token may be chosen by what comes after it")

    def check(self, experts: int, k: int) -> None:
        problems = []
        if self.leak == "refused":
            what = "kind: expert_choice lets a causal model see its future: later tokens decide who is chosen"
            fix = "kind: topk with a selection_bias balances without; or leak: allowed, for a model that is not sampled"
            problems.append(RecipeError(what, "router", fix))
        if k != experts:
            what = f"kind: expert_choice can send a token to all of experts={experts}, so k={k} does not hold"
            problems.append(RecipeError(what, "router", f"k: {experts}; router.capacity is the average"))
        if self.capacity > experts:
            what = f"capacity={self.capacity} of experts={experts}: no expert can take a token twice"
            problems.append(RecipeError(what, "router", f"capacity: at most {experts}"))
        if problems:
            raise Problems(problems)

    def build(self, ctx: BuildContext, experts: int, k: int) -> ExpertChoice:
        return ExpertChoice(self, ctx, experts, k)


class ExpertChoice(Logits):
    dropless = False

    def __init__(self, cfg: ExpertChoiceConfig, ctx: BuildContext, experts: int, k: int):
        cfg.check(experts, k)
        super().__init__(experts, ctx)
        self.k = cfg.capacity

    def forward(self, x: Tensor, seq: Sequence, split: TokenSplit) -> Routing:  # [b, s/parts, h]
        logits = self.logits(x)
        shares = logits.softmax(-1)
        documents = split.whole(split.own(seq.documents), seq)  # [b, S]
        taken = chosen(split.whole(shares.detach(), seq), documents, self.k)
        if split.group is not None:
            taken = taken[:, split.places(seq)]
        everyone = torch.arange(shares.shape[-1], device=shares.device)
        return Routing(everyone.where(taken, NOWHERE), shares, shares, logits)


def chosen(scores: Tensor, documents: Tensor, capacity: float) -> Tensor:
    """scores [b, s, e], documents [b, s] of whole sequences -> bool [b, s, e]: who takes whom.

    Each expert takes floor(capacity * n / e) of a document of n tokens, at least one and none of padding.
    """
    b, s, e = scores.shape
    starts = torch.ones_like(documents)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    piece = starts.cumsum(1) - 1  # [b, s], the documents of each row counted from 0
    length = count(piece, s)  # [b, s]
    room = (length.double() * capacity / e).floor().long().clamp(min=1).gather(1, piece)
    room = room.where(documents != PADDING, 0)
    best = scores.sort(dim=1, descending=True, stable=True).indices
    pieces = piece[..., None].expand(-1, -1, e)
    order = best.gather(1, pieces.gather(1, best).argsort(dim=1, stable=True))  # by document, then by score
    first = (length.cumsum(1) - length).gather(1, piece)  # where each token's document starts
    ranks = torch.arange(s, device=scores.device)[None, :, None].expand(b, -1, e)
    place = torch.empty_like(order).scatter_(1, order, ranks) - first[..., None]
    return place < room[..., None]
