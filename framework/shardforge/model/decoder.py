"""Tokens to vectors, blocks, norm, head. A pipeline stage has some of these; the others are None."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from shardforge.core.dims import Dim
from shardforge.model.block import Block
from shardforge.model.context import BuildContext
from shardforge.model.mtp import MTP, TERM
from shardforge.nn.dropout import Dropout
from shardforge.nn.sequence import Sequence
from shardforge.recipe.model import ModelConfig


class Decoder(nn.Module):
    """With labels it returns the objective's sums, without them logits (or the stream, in mid-pipeline)."""

    def __init__(self, cfg: ModelConfig, objective: nn.Module):
        super().__init__()
        self.width = cfg.hidden  # of the stream
        sizes = Dim("hidden", cfg.hidden), Dim("vocab", cfg.vocab), len(cfg.layers)
        ctx = BuildContext(*sizes, cfg.init, cfg.core, ffns=tuple(cfg.blocks[name].ffn for name in cfg.layers))
        self.embed = cfg.embedding.build(ctx)
        self.dropout = Dropout(cfg.dropout, "embed")
        self.blocks = nn.ModuleDict(
            {str(layer): Block(cfg.blocks[name], ctx.at(layer)) for layer, name in enumerate(cfg.layers)}
        )
        self.norm = cfg.norm.build(ctx.hidden)
        self.head = cfg.head.build(ctx, self.embed)
        self.mtp = MTP(cfg.mtp, cfg, ctx, self.embed) if cfg.mtp is not None and cfg.mtp.depth else None
        self.objective = objective

    @property
    def ahead(self) -> int:
        """Tokens behind the next one that it learns to predict: how far `Sequence.ahead` must look."""
        return self.mtp.depth if self.mtp is not None else 0

    @property
    def terms(self) -> tuple[str, ...]:
        """What it reports where it is given labels and `Sequence.ahead`."""
        return (*self.objective.terms, TERM) if self.mtp is not None else self.objective.terms

    def forward(self, x: Tensor, seq: Sequence, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """x: tokens [b, s], or the stream [b, s, h] in mid-pipeline; labels [b, s].

        Without `seq.ahead` only the next token is scored.
        """
        for module in self.modules():
            if (prepare := getattr(module, "prepare", None)) and (getattr(module, "trains", True) or not seq.training):
                prepare(seq)
        if self.embed is not None:
            x = self.dropout(self.embed(x, seq), seq)
        for block in self.blocks.values():
            x = block(x, seq)
        if self.head is None:
            return x
        normed = self.norm(x)
        if labels is None:
            return self.head(normed)
        out = self.objective(normed, self.head, labels)
        if self.mtp is None or not seq.ahead:
            return out
        further = [self.objective(each, self.head, wanted) for each, wanted in self.mtp(x, normed, seq)]
        return self.mtp.join(out, further, seq.progress)

    def part(self, layers: Collection[int], *, first: bool, last: bool) -> Decoder:
        """A decoder of some of these modules, shared with this one: the blocks of `layers`, the embedding of the
        `first` stage of a pipeline, and what follows the last block of the `last`."""
        out = Decoder.__new__(Decoder)
        nn.Module.__init__(out)
        out.width = self.width
        out.embed, out.dropout = self.embed if first else None, self.dropout
        out.blocks = nn.ModuleDict({name: block for name, block in self.blocks.items() if int(name) in layers})
        for name in ("norm", "head", "mtp", "objective"):
            setattr(out, name, getattr(self, name) if last else None)
        return out
