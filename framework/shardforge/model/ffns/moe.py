"""Mixture of experts: each token goes through k of many gated linear units.

Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538; shared experts are Dai et al. 2024,
    "DeepSeekMoE", arXiv:2401.06066, eq. 9-11; `balance` is DeepSeek-AI 2024, "DeepSeek-V3", arXiv:2412.19437,
    eq. 17-20; `z_loss` is Zoph et al. 2022, "ST-MoE", arXiv:2202.08906, eq. 5; `capacity` is Fedus et al. 2021,
    "Switch Transformers", arXiv:2101.03961, eq. 3.
Changes: y = shared(x) + sum of weight_i * expert_i(x) over the k experts that the router chose. Added to the loss:
    balance * mean over sequences of sum_i f_i P_i, where f_i = experts/k * the share of tokens that chose expert i and
    P_i is its mean affinity share, so that 1 is balanced; and z_loss * mean over tokens of logsumexp(logits)^2.
    Padding counts in neither. Both are reported with their factors, added over layers.
Cost: 3 * hidden * inner weights an expert, of which a token meets k.
Limits: capacity counts in documents, not in batches: an expert keeps the first ceil(capacity * k * n / experts) tokens
    of a document of n tokens that chose it; the others lose that expert's term, in evaluation too. So the result does
    not depend on neighbours in a packed sequence, on micro-batches or on the layout, but the work of an expert in one
    micro-batch is bounded only by the sum of these. "dropped" reports lost terms a token, added over layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import FFN, Router, ffns
from shardforge.model.activations import CURVES, Activation
from shardforge.model.capacity import kept
from shardforge.model.context import BuildContext
from shardforge.model.routing import Routing
from shardforge.nn.batch import PADDING
from shardforge.nn.dispatch import NOWHERE, Dispatch, Local, count
from shardforge.nn.fused import gated
from shardforge.nn.grouped import grouped_linear
from shardforge.nn.module import Module, local
from shardforge.nn.record import charge
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit


@ffns.register("moe")
@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    experts: int = option(REQUIRED, "experts to choose from", at_least=1)
    k: int = option(REQUIRED, "experts a token goes through", at_least=1)
    inner: int = option(REQUIRED, "width between the projections of one expert", at_least=1)
    activation: Activation = option("silu", "curve on the gate of an expert")
    router: Router = option("topk", "how experts are chosen and weighted")
    shared: FFN | None = option(None, "an ffn that every token goes through besides, like {kind: glu, inner: 512}")
    capacity: float | None = option(
        None, "room of an expert, in multiples of an even share; empty drops nothing", above=0
    )
    balance: float = option(0.0, "factor of the balance loss, which is 1 where experts are used evenly", at_least=0)
    z_loss: float = option(0.0, "factor of the router's squared log-normalizer; ST-MoE takes 1e-3", at_least=0)

    def __post_init__(self) -> None:
        if self.k > self.experts:
            raise RecipeError(f"k={self.k} of experts={self.experts} cannot be chosen", fix=f"k: {self.experts}")
        if isinstance(self.shared, MoEConfig):
            raise RecipeError("a mixture that every token goes through, in a mixture", "shared", "give it another kind")

    def build(self, ctx: BuildContext) -> MoE:
        return MoE(self, ctx)


class Experts(Module):
    """Gated linear units side by side. `chosen` of them meet each token."""

    slot = "experts"

    def __init__(self, cfg: MoEConfig, ctx: BuildContext):
        super().__init__()
        e, h, f = Dim("expert", cfg.experts), ctx.hidden, Dim("expert_ffn", cfg.inner)
        self.curve, self.chosen, self.hidden = CURVES[cfg.activation], cfg.k, h.size
        self.declare("gate", e, h, f, init=ctx.into(h))
        self.declare("up", e, h, f, init=ctx.into(h))
        self.declare("down", e, f, h, init=ctx.out_of(f))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:  # [n, h] expert by expert, [e] -> [n, h]
        gate, up = (grouped_linear(x, local(weight), counts) for weight in (self.gate, self.up))
        return grouped_linear(gated(gate, up, self.curve), local(self.down), counts)


class MoE(Module):
    """`dispatch` brings tokens to their experts, `split` says which tokens are here; a pass replaces both."""

    slot = "ffn"
    boundary = "local"

    def __init__(self, cfg: MoEConfig, ctx: BuildContext):
        super().__init__()
        self.layer, self.choices, self.k = ctx.layer, cfg.experts, cfg.k
        self.capacity, self.balance, self.z_loss = cfg.capacity, cfg.balance, cfg.z_loss
        self.router = cfg.router.build(ctx, cfg.experts, cfg.k)
        self.experts = Experts(cfg, ctx)
        self.shared = None if cfg.shared is None else cfg.shared.build(ctx)
        self.dispatch: Dispatch = Local(cfg.experts, self.dropless)
        self.split = TokenSplit()
        noted = {"balance": cfg.balance, "dropped": cfg.capacity, "router_z": cfg.z_loss}
        self.records = tuple(name for name, given in noted.items() if given)

    @property
    def dropless(self) -> bool:
        return self.capacity is None

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        routing = self.router(x, seq, self.split)
        expert = routing.expert if self.dropless else self.limited(routing.expert, seq)
        y = self.dispatch(x.flatten(0, 1), expert.flatten(0, 1), routing.weight.flatten(0, 1), self.experts).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, seq)
        return self.charged(y, routing, seq)

    def limited(self, expert: Tensor, seq: Sequence) -> Tensor:
        """`expert` with NOWHERE for what its expert has no room for."""
        documents = self.split.own(seq.documents)
        whole = self.split.whole(torch.cat([expert, documents[..., None]], -1), seq)
        keep = kept(whole[..., :-1], whole[..., -1], self.choices, self.capacity)
        if self.split.group is not None:
            keep = keep[:, self.split.places(seq)]
        dropped = ((~keep).sum(-1) * (documents != PADDING)).sum()
        self.note("dropped", dropped.double() / max(1, seq.shares.tokens), seq)
        return expert.where(keep, NOWHERE)

    def charged(self, y: Tensor, routing: Routing, seq: Sequence) -> Tensor:
        """y, whose backward pass also differentiates the auxiliary losses."""
        real = self.split.own(seq.documents) != PADDING  # [b, s]
        if self.balance:
            y = self.noted(y, "balance", self.balance / seq.shares.sequences * self.imbalance(routing, real), seq)
        if self.z_loss:
            squares = routing.logits.logsumexp(-1).square() * real
            y = self.noted(y, "router_z", self.z_loss / max(1, seq.shares.tokens) * squares.sum(), seq)
        return y

    def noted(self, y: Tensor, name: str, loss: Tensor, seq: Sequence) -> Tensor:
        self.note(name, loss, seq)
        return charge(y, loss)

    def note(self, name: str, value: Tensor, seq: Sequence) -> None:
        seq.record(name, self.layer, value)

    def imbalance(self, routing: Routing, real: Tensor) -> Tensor:
        """This rank's part of the sum over sequences of sum_i f_i P_i.

        f has no gradient, so its counts are those of whole sequences, while P stays the sum over the tokens here.
        """
        chosen = routing.expert.where(real[..., None], NOWHERE).flatten(1)
        counts = self.split.total(count(chosen, self.choices))  # [b, e], over whole sequences
        shares = (routing.shares * real[..., None]).sum(1)
        picks = counts.sum(1, keepdim=True).clamp(min=1).to(shares.dtype)  # k a token
        return (self.choices * counts / picks * shares * self.k / picks).sum()
