"""A tiny mixture in float64 on its own, what it is called with, and all experts on all tokens to compare it with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.model.context import BuildContext
from shardforge.model.ffns.moe import MoE
from shardforge.nn.batch import PADDING
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence, Shares
from shardforge.recipe.model import InitConfig
from tests.tiny import tiny
from tests.tiny_kinds import MOE

B, S, H, E, K = 2, 9, 16, 4, 2


def moe(layer: int = 1, layers: int = 1, hidden: int = H, **options: Any) -> MoE:
    """Layer `layer` of `layers` equal ones; biases are not zero."""
    cfg = tiny(ffn=MOE | options).model.blocks["one"].ffn
    ctx = BuildContext(Dim("hidden", hidden), Dim("vocab", 32), 2, InitConfig(std=0.3), layer=layer)
    made = cfg.build(replace(ctx, ffns=(cfg,) * layers)).double()
    fill(made, layer)
    generator = torch.Generator().manual_seed(1)
    for name, weight in made.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(generator=generator)
    return made


def tokens(rows: int = B, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, S, H, generator=generator, dtype=torch.float64, requires_grad=True)


def sequence(
    padded: int = 0, shares: Shares | None = None, rows: range = range(B), key: int | None = None, length: int = S
) -> Sequence:
    """Rows of one document each, with `padded` positions behind it; a `key` makes it one of training."""
    documents = torch.zeros(len(rows), length, dtype=torch.int64)
    if padded:
        documents[:, -padded:] = PADDING
    shares = shares or Shares(len(rows) * (length - padded), len(rows))
    where = torch.arange(length).expand(len(rows), -1), documents, torch.tensor(rows)
    return Sequence(*where, None if key is None else torch.tensor(key), dtype=torch.float64, shares=shares)


def one(module: MoE, index: int, x: Tensor) -> Tensor:
    """One expert on all tokens, from the definition."""
    experts = module.experts

    def product(name: str, x: Tensor) -> Tensor:
        y = torch.einsum("...d,df->...f", x, getattr(experts, name)[index])
        return y + getattr(experts, f"{name}_bias")[index] if experts.biased else y

    cfg, up = module.cfg, product("up", x)
    if cfg.form == "mlp":
        inner = torch.nn.functional.silu(up)
    elif cfg.clamp is None:
        inner = torch.nn.functional.silu(product("gate", x)) * up
    else:
        gate = product("gate", x).clamp(max=cfg.clamp)
        inner = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-cfg.clamp, cfg.clamp) + 1)
    return product("down", inner)


def everything(module: MoE, x: Tensor, seq: Sequence) -> Tensor:
    """Every expert on every token, times its weight or zero."""
    routing = module.router(x, seq, module.split)
    chosen = torch.nn.functional.one_hot(routing.expert, E).to(x.dtype)  # [b, s, k, e]
    outputs = torch.stack([one(module, index, x) for index in range(E)])
    return torch.einsum("bsk,bske,ebsh->bsh", routing.weight, chosen, outputs)


def reroute(module: MoE, expert: Tensor, weight: Tensor | None = None) -> None:
    """Every token to the experts [s, k] of its place, whatever it is; with these weights [s, k] if any."""
    route = module.router.forward

    def forward(x: Tensor, seq: Sequence, split: Any) -> Any:
        found = replace(route(x, seq, split), expert=expert.expand(len(x), -1, -1))
        return found if weight is None else replace(found, weight=weight.to(x.dtype).expand(len(x), -1, -1))

    module.router.forward = forward


def gradients(loss: Tensor, module: MoE, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True, materialize_grads=True))
