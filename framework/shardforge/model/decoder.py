"""Tokens to vectors, blocks, norm, head. A pipeline stage has some of these; the others are None."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from shardforge.core.dims import Dim
from shardforge.model.block import Block
from shardforge.model.context import BuildContext
from shardforge.nn.dropout import Dropout
from shardforge.nn.sequence import Sequence
from shardforge.recipe.model import ModelConfig


class Decoder(nn.Module):
    """With labels it returns the objective's sums, without them logits (or the stream, in mid-pipeline)."""

    def __init__(self, cfg: ModelConfig, objective: nn.Module):
        super().__init__()
        self.width = cfg.hidden  # of the stream
        ctx = BuildContext(Dim("hidden", cfg.hidden), Dim("vocab", cfg.vocab), len(cfg.layers), cfg.init, cfg.core)
        self.embed = cfg.embedding.build(ctx)
        self.dropout = Dropout(cfg.dropout, "embed")
        self.blocks = nn.ModuleDict(
            {str(layer): Block(cfg.blocks[name], ctx.at(layer)) for layer, name in enumerate(cfg.layers)}
        )
        self.norm = cfg.norm.build(ctx.hidden)
        self.head = cfg.head.build(ctx, self.embed)
        self.objective = objective

    def forward(self, x: Tensor, seq: Sequence, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """x: tokens [b, s], or the stream [b, s, h] in mid-pipeline; labels [b, s]."""
        for module in self.modules():
            if prepare := getattr(module, "prepare", None):
                prepare(seq)
        if self.embed is not None:
            x = self.dropout(self.embed(x, seq), seq)
        for block in self.blocks.values():
            x = block(x, seq)
        if self.head is None:
            return x
        x = self.norm(x)
        return self.head(x) if labels is None else self.objective(x, self.head, labels)

    def part(self, layers: Collection[int], *, first: bool, last: bool) -> Decoder:
        """A decoder of some of these modules, shared with this one: the blocks of `layers`, the embedding of the
        `first` stage of a pipeline, and norm, head and objective of the `last`."""
        out = Decoder.__new__(Decoder)
        nn.Module.__init__(out)
        out.width = self.width
        out.embed, out.dropout = self.embed if first else None, self.dropout
        out.blocks = nn.ModuleDict({name: block for name, block in self.blocks.items() if int(name) in layers})
        out.norm, out.head, out.objective = (self.norm, self.head, self.objective) if last else (None, None, None)
        return out
