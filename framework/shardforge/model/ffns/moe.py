"""Mixture of experts: each token goes through k of many feed-forward units.

Paper: Shazeer et al. 2017, "Outrageously Large Neural Networks", arXiv:1701.06538. Small experts beside shared ones are
    Dai et al. 2024, "DeepSeekMoE", arXiv:2401.06066, eq. 9-11; `shared_gate` is Qwen2-MoE's, arXiv:2407.10671, section
    2.2.2; `capacity` is Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, eq. 3; `clamp` is gpt-oss's,
    arXiv:2508.10925; `z_loss` is Zoph et al. 2022, "ST-MoE", arXiv:2202.08906, eq. 5. `balance`: Switch, eq. 4-6;
    scope sequence is DeepSeek-AI 2024, "DeepSeek-V3", arXiv:2412.19437, eq. 17-20; scope batch is Qiu et al. 2025,
    "Demons in the Detail", arXiv:2501.11873.
Changes: y = [sigmoid(x w)] shared(x) + sum of weight_i * expert_i(x) over the k experts that the router chose. An
    expert is a glu, curve(x gate) * (x up) down, or an mlp, curve(x up) down; with `clamp` c it is
    (u + 1) * g * sigmoid(1.702 g) down, g = min(x gate, c), u = x up within +-c. Added to the loss: of each `balance`
    weight * E sum_i f_i P_i, f_i being expert i's share of the choices and P_i its mean affinity share, 1 where use is
    even, added over layers; and z_loss * mean over tokens of logsumexp(logits)^2. Padding counts in neither.
Cost: 3 * hidden * inner weights a glu expert (2 an mlp), of which a token meets k. `balance` with counts: now of scope
    batch or layers runs the forward pass of the whole batch twice.
Limits: capacity counts in documents, not in batches: an expert keeps max(min, factor * k * n / experts) tokens of a
    document of n tokens that chose it; the others lose that expert's term. So the result does not depend on neighbours
    in a packed sequence, on micro-batches or on the layout, but the work of an expert in one micro-batch is bounded
    only by the sum of these. `drop: weight` lets later tokens push out earlier ones of their document. Losses
    and loads count what was chosen, not what was kept. A pool of sequences must lie in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.errors import ForgeError, Problems, RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import FFN, Router, ffns
from shardforge.model.activations import Activation
from shardforge.model.balance import Balance, pooled, spread_evenly, whole_pools
from shardforge.model.capacity import Capacity
from shardforge.model.context import BuildContext
from shardforge.model.experts import Experts, Form
from shardforge.model.routing import Routing
from shardforge.nn.batch import PADDING
from shardforge.nn.dispatch import NOWHERE, Dispatch, Local, count
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module
from shardforge.nn.record import charge
from shardforge.nn.sequence import Sequence
from shardforge.nn.tokens import TokenSplit


@ffns.register("moe")
@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    experts: int = option(REQUIRED, "experts to choose from", at_least=1)
    k: int = option(REQUIRED, "experts a token goes through", at_least=1)
    inner: int = option(REQUIRED, "width between the projections of one expert", at_least=1)
    form: Form = option("glu", "glu: one projection gates the other; mlp: a curve between two projections")
    activation: Activation = option("silu", "curve of an expert: on the gate, or between the projections")
    bias: bool = option(False, "whether the projections of experts have biases")
    clamp: float | None = option(
        None, "limit of gate and up in gpt-oss's gated unit, which takes 7.0; empty is a plain one", above=0
    )
    router: Router = option("topk", "how experts are chosen and weighted")
    shared: FFN | None = option(None, "an ffn that every token goes through besides, like {kind: glu, inner: 512}")
    shared_gate: Literal["none", "sigmoid"] = option("none", "sigmoid: one learned gate a token on the shared ffn")
    capacity: Capacity | None = option(None, "room of an expert, like {factor: 1.25}; empty drops nothing")
    balance: tuple[Balance, ...] = option(
        (), "losses for even use of the experts, like [{scope: sequence, weight: 1.0e-4}]"
    )
    z_loss: float = option(0.0, "factor of the router's squared log-normalizer; ST-MoE takes 1e-3", at_least=0)

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise Problems(problems)

    def _problems(self) -> Iterator[ForgeError]:
        if self.k > self.experts:
            yield RecipeError(f"k={self.k} of experts={self.experts} cannot be chosen", "k", f"k: {self.experts}")
        else:
            yield from _found(partial(self.router.check, self.experts, self.k))
        if self.clamp is not None and self.form != "glu":
            what = f"clamp={self.clamp} limits a gate, and form: {self.form} has none"
            yield RecipeError(what, "clamp", "form: glu, or leave clamp out")
        if self.clamp is not None and self.activation != "silu":
            what = f"clamp={self.clamp} brings its own curve, so activation: {self.activation} would not be used"
            yield RecipeError(what, "activation", "leave activation or clamp out")
        if isinstance(self.shared, MoEConfig):
            yield RecipeError("a mixture that every token goes through, in a mixture", "shared", "give it another kind")
        if self.shared is None and self.shared_gate != "none":
            what = f"shared_gate: {self.shared_gate} has no shared ffn to gate"
            yield RecipeError(what, "shared_gate", "shared: {kind: glu, inner: ...}, or leave shared_gate out")
        scopes = [each.scope for each in self.balance]
        for scope in sorted({each for each in scopes if scopes.count(each) > 1}):
            what = f"{scopes.count(scope)} losses with scope: {scope}"
            yield RecipeError(what, "balance", "one for each scope; their weights add up")

    def build(self, ctx: BuildContext) -> MoE:
        return MoE(self, ctx)

    def peers(self, ctx: BuildContext) -> tuple[int, ...]:
        """Layers whose use of experts is pooled by scope: layers with that of ctx.layer: in the stack, those with as
        many experts and such a loss; a layer behind the stack is alone."""
        found = tuple(layer for layer, ffn in enumerate(ctx.ffns) if isinstance(ffn, MoEConfig) and self.pools(ffn))
        return found if ctx.layer in found else (ctx.layer,)

    def pools(self, other: MoEConfig) -> bool:
        return other.experts == self.experts and any(each.scope == "layers" for each in other.balance)


def _found(check: partial[None]) -> Iterator[ForgeError]:
    try:
        check()
    except Problems as many:
        yield from many.problems
    except ForgeError as one:
        yield one


class MoE(Module):
    """`dispatch` brings tokens to their experts, `split` says which tokens are here; a pass replaces both."""

    slot = "ffn"
    boundary = "local"

    def __init__(self, cfg: MoEConfig, ctx: BuildContext):
        super().__init__()
        self.cfg, self.layer, self.choices, self.peers = cfg, ctx.layer, cfg.experts, cfg.peers(ctx)
        self.capacity, self.balance, self.z_loss = cfg.capacity, cfg.balance, cfg.z_loss
        self.router = cfg.router.build(ctx, cfg.experts, cfg.k)
        self.experts = Experts(
            ctx,
            experts=cfg.experts,
            chosen=self.router.k,
            inner=cfg.inner,
            form=cfg.form,
            activation=cfg.activation,
            bias=cfg.bias,
            clamp=cfg.clamp,
        )
        self.shared = None if cfg.shared is None else cfg.shared.build(ctx)
        gated = cfg.shared_gate == "sigmoid"
        self.shared_gate = Linear(ctx.hidden, Dim("shared_gate", 1), ctx.into(ctx.hidden)) if gated else None
        self.dispatch: Dispatch = Local(cfg.experts, cfg.capacity is None and self.router.dropless)
        self.split = TokenSplit()
        self.spans = tuple(each for each in cfg.balance if each.scope != "sequence")
        self.counts_now = any(each.counts_now for each in cfg.balance)
        for each in cfg.balance:
            if each.counts == "previous":
                self.remember(_last(each), Dim("router", cfg.experts))
        noted = {"balance": cfg.balance, "router_z": cfg.z_loss}
        self.records = tuple(name for name, given in noted.items() if given)
        self.tallies = {"load": cfg.experts, "router": 3}  # of router: tokens, nats of entropy, dropped assignments

    def prepare(self, seq: Sequence) -> None:
        """Refuse a micro-batch of training that cuts pools of sequences."""
        for each in self.balance if seq.training else ():
            if each.scope == "sequence" and each.sequences > 1:
                seq.prepare(("pools", each.sequences), partial(whole_pools, seq, each.sequences))

    def forward(self, x: Tensor, seq: Sequence) -> Tensor:  # [b, s, h] -> [b, s, h]
        routing = self.router(x, seq, self.split)
        expert = routing.expert if self.capacity is None else self.limited(self.capacity, routing, seq)
        y = self.dispatch(x.flatten(0, 1), expert.flatten(0, 1), routing.weight.flatten(0, 1), self.experts).view_as(x)
        if self.shared is not None:
            common = self.shared(x, seq)
            y = y + (common if self.shared_gate is None else self.shared_gate(x).sigmoid() * common)
        return self.charged(y, routing, expert, seq)

    def limited(self, capacity: Capacity, routing: Routing, seq: Sequence) -> Tensor:
        """The experts [b, s, k] with NOWHERE for what has no room."""
        documents, weight = self.split.own(seq.documents), routing.weight.detach()
        whole = self.split.whole(torch.cat([routing.expert, documents[..., None]], -1), seq)
        if capacity.drop == "weight":
            weight = self.split.whole(weight, seq)
        keep = capacity.kept(whole[..., :-1], weight, whole[..., -1], self.choices, training=seq.training)
        if self.split.group is not None:
            keep = keep[:, self.split.places(seq)]
        return routing.expert.where(keep, NOWHERE)

    def charged(self, y: Tensor, routing: Routing, expert: Tensor, seq: Sequence) -> Tensor:
        """y, whose backward pass also differentiates the auxiliary losses."""
        real = self.split.own(seq.documents) != PADDING  # [b, s]
        load = count(routing.expert.where(real[..., None], NOWHERE).flatten(1), self.choices)  # [b, e], before any drop
        losses: dict[str, Tensor] = {}
        if self.balance:
            used = self.used(load, seq) if self.spans else {}
            losses["balance"] = self.imbalance(routing, real, used, seq)
        if self.z_loss:
            squares = routing.logits.logsumexp(-1).square() * real
            losses["router_z"] = self.z_loss / max(1, seq.shares.tokens) * squares.sum()
        self.note(self.tallied(routing, expert, real, load) | losses, seq)
        return charge(y, torch.stack(list(losses.values())).sum()) if losses else y

    @torch.no_grad()
    def tallied(self, routing: Routing, expert: Tensor, real: Tensor, load: Tensor) -> dict[str, Tensor]:
        entropy = (torch.special.entr(routing.shares).sum(-1) * real).sum()
        dropped = (((expert == NOWHERE) & (routing.expert != NOWHERE)).sum(-1) * real).sum()
        return {"load": load.sum(0).double(), "router": torch.stack([real.sum(), entropy, dropped]).double()}

    def note(self, values: Mapping[str, Tensor], seq: Sequence) -> None:
        for name, value in values.items():
            seq.record(name, self.layer, value)

    def imbalance(self, routing: Routing, real: Tensor, used: Mapping[str, Tensor], seq: Sequence) -> Tensor:
        """This rank's part of all balance losses, with their weights, 0-d. `used` has f of those over batches."""
        shares, total = (routing.shares * real[..., None]).sum(1), routing.shares.new_zeros(())  # [b, e]
        for each in self.balance:
            if each.scope == "sequence":
                counts = count(routing.counted.where(real[..., None], NOWHERE).flatten(1), self.choices)
                counts = self.split.total(torch.cat([counts, real.sum(1, keepdim=True)], 1))  # over whole sequences
                part = pooled(counts[:, :-1], counts[:, -1], shares, each.sequences, seq.shares.sequences)
            else:
                f = used[each.scope].to(shares.dtype)
                part = self.choices * (f * shares.sum(0)).sum() / max(1, seq.shares.tokens)
                part = part / len(self.peers) if each.scope == "layers" else part
            total = total + each.weight * part
        return total

    def used(self, load: Tensor, seq: Sequence) -> dict[str, Tensor]:
        """By scope of a loss, batch or layers: the share of each expert [e] in what was chosen there."""
        return {loss.scope: self.spread_over(loss, load, seq) for loss in self.spans}

    def spread_over(self, loss: Balance, load: Tensor, seq: Sequence) -> Tensor:
        if loss.counts == "previous":
            return spread_evenly(getattr(self, _last(loss)))
        if seq.loads is None:  # nothing is known but this micro-batch
            return spread_evenly(self.split.total(load.sum(0)))
        return spread_evenly(self.pooled_load(loss, seq.loads))

    def pooled_load(self, loss: Balance, loads: Mapping[int, Tensor]) -> Tensor:
        """The loads [e] in the scope of a loss, of those of every layer over the whole batch."""
        layers = self.peers if loss.scope == "layers" else (self.layer,)
        return torch.stack([loads[layer] for layer in layers]).sum(0)

    @torch.no_grad()
    def settle(self, loads: Mapping[int, Tensor], progress: float) -> None:
        """Remember the loads of a step where the next one balances by them."""
        for each in self.balance:
            if each.counts == "previous":
                getattr(self, _last(each)).copy_(self.pooled_load(each, loads))


def _last(loss: Balance) -> str:
    return "last_load" if loss.scope == "batch" else "last_loads"
