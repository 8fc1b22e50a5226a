"""Losses that pull a router towards even use of its experts; each is 1 times its weight where use is even.

With E experts: loss = E sum_i f_i P_i, where f_i is expert i's share of the choices and P_i the mean of its affinity
shares, over the tokens of a scope. f has no gradient and P is linear in tokens, so every rank charges its own tokens'
part of P with the f of the whole scope, and the parts add up to one process's gradient on any layout. Padding counts
in neither.

Other libraries' coefficients mean the same loss with other values at balance: see `from_transformers`,
`from_megatron` and `from_switch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from shardforge.core.errors import Problems, RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.nn.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Balance:
    scope: Literal["sequence", "batch", "layers"] = option(
        REQUIRED,
        "tokens over which use is made even: of each sequence (or pool of them), of the whole batch, or of the whole "
        "batch in all layers together, where one layer may starve an expert that another one overuses",
    )
    weight: float = option(REQUIRED, "factor of the loss, which is 1 where experts are used evenly", above=0)
    sequences: int = option(
        1, "rows of the batch, one after the other, that are one pool (scope: sequence)", at_least=1
    )
    counts: Literal["now", "previous"] = option(
        "now",
        "step whose choices f counts, for scope batch and layers: now runs the forward pass of the whole batch twice, "
        "a third more work; previous takes those of the step before",
    )

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise Problems(problems)

    def _problems(self) -> Iterator[RecipeError]:
        if self.sequences != 1 and self.scope != "sequence":
            what = f"scope: {self.scope} is the whole batch, and sequences={self.sequences} are a part of it"
            yield RecipeError(what, "sequences", "leave it out, or scope: sequence")
        if self.counts != "now" and self.scope == "sequence":
            what = "the sequences of the step before are others, so scope: sequence cannot take counts: previous"
            yield RecipeError(what, "counts", "leave it out, or scope: batch")

    @property
    def counts_now(self) -> bool:
        """Whether the loads of a step must be known before its backward pass."""
        return self.scope != "sequence" and self.counts == "now"


def from_transformers(coefficient: float, k: int) -> Balance:
    """`router_aux_loss_coef` of a transformers model with k experts a token: pooled over layers, k at balance."""
    return Balance(scope="layers", weight=coefficient * k)


def from_megatron(
    coefficient: float, kind: Literal["aux_loss", "seq_aux_loss", "global_aux_loss"], micro_batch: int = 1
) -> Balance:
    """`moe_aux_loss_coeff` of Megatron-LM: 1 at balance, added over layers. `micro_batch` rows are pooled by aux_loss;
    its global_aux_loss takes f of the batch up to now, which scope: batch counts in full."""
    if kind == "global_aux_loss":
        return Balance(scope="batch", weight=coefficient)
    return Balance(scope="sequence", weight=coefficient, sequences=micro_batch if kind == "aux_loss" else 1)


def from_switch(coefficient: float, rows: int = 1) -> Balance:
    """Switch Transformer's alpha, for groups of `rows` sequences: alpha at balance, added over layers."""
    return Balance(scope="sequence", weight=coefficient, sequences=rows)


def pooled(counts: Tensor, tokens: Tensor, shares: Tensor, rows: int, sequences: int) -> Tensor:
    """This rank's part of the mean over pools of E sum_i f_i P_i, 0-d.

    counts [b, e] of choices and tokens [b] of whole sequences, shares [b, e] summed over the tokens here; a pool is
    `rows` sequences, of `sequences` in the batch that hold a token. A pool's part of the mean is its share of those:
    rows of padding, or rows left over in evaluation, make a smaller pool.
    """
    b, e = counts.shape
    pools = -(-b // rows)

    def added(x: Tensor) -> Tensor:  # [b, ...] -> [pools, ...]
        return F.pad(x, (0, 0, 0, pools * rows - b)).unflatten(0, (pools, rows)).sum(1)

    sizes = added((tokens > 0).to(shares.dtype)[:, None])
    counts, tokens, shares = added(counts), added(tokens[:, None]), added(shares)
    f = counts.to(shares.dtype) / counts.sum(1, keepdim=True).clamp(min=1)
    return e * (sizes / max(1, sequences) * f * shares / tokens.clamp(min=1)).sum()


def spread_evenly(load: Tensor) -> Tensor:
    """load [e] -> the share of each expert; even shares where nothing was counted yet."""
    load = load.double()
    total = load.sum()
    return torch.where(total > 0, load / total.clamp(min=1), 1 / load.numel())


def whole_pools(seq: Sequence, rows: int, where: str = "balance") -> bool:
    """True; RecipeError where this micro-batch is not made of whole pools of `rows` sequences."""
    b = len(seq.rows)
    fix = f"train.sequences on each data rank and train.micro_batch must be multiples of {rows}, or write sequences: 1"
    if b % rows:
        raise RecipeError(f"pools of sequences={rows} do not fill a micro-batch of {b} sequences", where, fix)
    if isinstance(seq.rows, FakeTensor) or seq.rows.is_meta:
        return True
    pools = seq.rows.view(-1, rows) // rows
    if not bool((pools == pools[:, :1]).all()):
        what = f"rows {seq.rows.tolist()} of the batch are not whole pools of sequences={rows} side by side"
        raise RecipeError(what, where, fix)
    return True
