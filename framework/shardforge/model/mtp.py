"""Multi-token prediction: modules after the last layer that predict the tokens behind the next one, one a depth.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 2.2, eq. 21-25.
Changes: for j = 1 ... depth, h_j = block_j(project_j [norm(embedding of token i + j); norm(h_(j-1))]) predicts what
    position i + j predicts, through a norm of its own and the model's embedding and head. Added to the loss: weight /
    depth * the sum of the depths' losses, each divided by the tokens that the main loss scores. Positions whose
    token i + j is beyond the row or in another document are padding here. "mtp" reports the mean of the depths'
    cross entropies, without weight, by the same number of tokens.
Cost: for each depth a block, 2 * hidden^2 weights, the head's matmul, and the gradient of the head's table once more
    in memory; not counted in the FLOP of the model. Nothing where only logits are asked for.
Limits: block j stands behind all layers (its number is layers + j - 1), so in a pipeline it is on the last stage. With
    a tied head, schedules that split the backward pass are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shardforge.core.dims import Dim
from shardforge.core.phases import value_at
from shardforge.model.block import Block
from shardforge.model.context import BuildContext
from shardforge.nn import sequence
from shardforge.nn.dropout import Dropout
from shardforge.nn.linear import Linear
from shardforge.nn.module import Module
from shardforge.recipe.model import ModelConfig, MTPConfig

TERM = "mtp"


class Further(Module):
    """The module of one depth."""

    def __init__(self, cfg: MTPConfig, model: ModelConfig, ctx: BuildContext):
        super().__init__()
        both = Dim("embed_hidden", 2 * ctx.hidden.size)
        self.embed_first = cfg.concat == "embed_first"
        self.dropout = Dropout(model.dropout, TERM, ctx.layer)
        self.embed_norm, self.hidden_norm = cfg.norm.build(ctx.hidden), cfg.norm.build(ctx.hidden)
        self.project = Linear(both, ctx.hidden, ctx.into(both))
        self.block = Block(model.blocks[cfg.block], ctx)
        self.norm = cfg.norm.build(ctx.hidden)

    def forward(self, embedded: Tensor, x: Tensor, seq: sequence.Sequence) -> Tensor:
        """The token ahead [b, s, h], and what the depth before made of the place [b, s, h] -> [b, s, h]."""
        pair = [self.embed_norm(self.dropout(embedded, seq)), self.hidden_norm(x)]
        return self.block(self.project(torch.cat(pair if self.embed_first else pair[::-1], -1)), seq)


class MTP(Module):
    """`mtp.0` is the module of depth 1. `embed` is the model's embedding, or its twin on another stage."""

    slot = "mtp"
    borrowed = ("embed",)

    def __init__(self, cfg: MTPConfig, model: ModelConfig, ctx: BuildContext, embed: Module):
        super().__init__()
        self.__dict__["embed"] = embed  # not a child: its weight has one name
        self.depth, self.weight, self.after_norm = cfg.depth, cfg.weight, cfg.hidden == "after_norm"
        for j in range(cfg.depth):
            self.add_module(str(j), Further(cfg, model, ctx.at(ctx.layers + j)))

    def forward(self, x: Tensor, normed: Tensor, seq: sequence.Sequence) -> Iterator[tuple[Tensor, Tensor]]:
        """x [b, s, h] as the last layer leaves it, and behind the model's norm -> of each depth what the head reads
        [b, s, h], and the labels [b, s].

        Attention keeps the tables of whole documents: what becomes padding are the last places of each, which no
        other place of theirs sees.
        """
        tokens, positions = (torch.cat([getattr(b, name) for b in seq.ahead]) for name in ("tokens", "positions"))
        embedded = self.embed(tokens, replace(seq, positions=positions))
        # joined in one place: where a weight meets the stream in several, torch splits its backward pass wrongly
        x, *embedded = torch.cat([normed if self.after_norm else x, embedded]).chunk(1 + self.depth)
        for j, (further, there) in enumerate(zip(self.children(), seq.ahead, strict=True)):
            here = replace(seq, documents=there.documents, shares=seq.shares.further(j))
            x = further(embedded[j], x, here)
            normed = further.norm(x)
            yield normed, there.labels
            x = normed if self.after_norm else x

    def join(
        self, main: Mapping[str, Tensor], further: Sequence[Mapping[str, Tensor]], progress: float
    ) -> dict[str, Tensor]:
        """The objective's sums for the next token, with those of each depth added; see `Decoder.forward`."""
        share = value_at(self.weight, progress) / self.depth
        total = main["total"] + share * torch.stack([sums["total"] for sums in further]).sum()
        return {**main, "total": total, TERM: torch.stack([sums["loss"] for sums in further]).mean()}
