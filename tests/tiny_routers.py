"""Small routers, tokens and sequences for tests of routers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardforge.core import slots
from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.model.routing import Routing
from shardforge.nn import counter
from shardforge.nn.batch import PADDING
from shardforge.nn.init import fill
from shardforge.nn.module import Module
from shardforge.nn.sequence import Sequence, Shares
from shardforge.nn.tokens import TokenSplit
from shardforge.recipe.model import InitConfig

B, S, H, E, K = 2, 5, 16, 8, 3
ALONE = TokenSplit()
LAYER = 1
NEEDS: dict[str, dict[str, Any]] = {"switch": {"k": 1}, "expert_choice": {"k": E, "leak": "allowed"}}
"""Kind -> what it needs besides its name."""


def router(
    kind: str = "topk",
    experts: int = E,
    k: int = K,
    *,
    hidden: int = H,
    dtype: torch.dtype = torch.float64,
    layer: int = LAYER,
    **options: Any,
) -> Module:
    """A router whose weights are drawn with a deviation of 1, where its kind leaves that open."""
    ctx = BuildContext(Dim("hidden", hidden), Dim("vocab", 32), 2, InitConfig(std=1.0), layer=layer)
    made = slots.routers[kind](**options).build(ctx, experts, k)
    fill(made, 0)
    for weight in made.parameters():
        weight.data = weight.data.to(dtype)
    return made


def plain(experts: int = E, k: int = K, **options: Any) -> Module:
    """A topk router whose logits are its input."""
    made = router(experts=experts, k=k, hidden=experts, **options)
    nn.init.eye_(made.weight)
    return made


def tokens(b: int = B, s: int = S, hidden: int = H, seed: int = 0) -> Tensor:
    return torch.randn(b, s, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence(
    b: int = B, s: int = S, *, padded: int = 0, step: int | None = None, shares: Shares | None = None
) -> Sequence:
    """Rows of one document each, the last `padded` places empty; `step` is that of a training step."""
    documents = torch.zeros(b, s, dtype=torch.int64)
    documents[:, s - padded :] = PADDING
    key = None if step is None else torch.tensor(counter.key(1, step))
    shares = shares or Shares(b * (s - padded), b)
    return Sequence(torch.arange(s).expand(b, -1), documents, torch.arange(b), key, torch.float64, shares=shares)


def routed(kind: str = "topk", **options: Any) -> Routing:
    """What a tiny router says of tiny tokens."""
    dtype = options.setdefault("dtype", torch.float64)
    return router(kind, **NEEDS.get(kind, {}) | options)(tokens().to(dtype), sequence(), ALONE)


def spread(routing: Routing) -> Tensor:
    """[b, s, e]: the weight of every expert, 0 for those that were not chosen."""
    return torch.zeros_like(routing.shares).scatter(-1, routing.expert, routing.weight)


def sets(expert: Tensor) -> Tensor:
    """Experts [..., k] in an order that says nothing."""
    return expert.sort(-1).values
