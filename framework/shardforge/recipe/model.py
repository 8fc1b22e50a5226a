"""The model part of a recipe: named blocks, and a stack that says how often each one comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.slots import FFN, Core, Embedding, Head, Mixer, Norm, Residual


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    std: float = option(0.02, "standard deviation of weight matrices", above=0)
    rule: Literal["flat", "depth_scaled", "fan_in"] = option(
        "flat",
        "flat: std everywhere; depth_scaled: matrices that write to the residual stream get std/sqrt(2*layers); "
        "fan_in: 1/sqrt(inputs) instead of std",
    )
    table_std: float | None = option(None, "standard deviation of the embedding table; empty means std", above=0)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    mixer: Mixer = option(REQUIRED, "what mixes positions, for example attention")
    ffn: FFN = option(REQUIRED, "what works on each position alone")
    residual: Residual = option("pre", "where the norms stand and how a branch joins the stream")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab: int = option(REQUIRED, "rows of the embedding table; at least the vocabulary of the tokenizer", at_least=2)
    hidden: int = option(REQUIRED, "width of the residual stream", at_least=1)
    embedding: Embedding = option("token", "token ids to vectors")
    blocks: Mapping[str, BlockConfig] = option(REQUIRED, "the kinds of block, by name")
    stack: tuple[str, ...] = option(REQUIRED, "order of the blocks from the first layer on, like [dense, moe x 26]")
    norm: Norm = option("rmsnorm", "the norm before the head")
    head: Head = option("linear", "vectors to logits")
    dropout: float = option(0.0, "share of the embedded vectors set to zero in training", at_least=0, at_most=0.99)
    core: Core = option("auto", "how attention is computed; the result is the same for each")
    init: InitConfig = option(InitConfig(), "how weights start")

    @property
    def layers(self) -> tuple[str, ...]:
        """Block name of every layer, first to last."""
        return tuple(name for item in self.stack for name in expand(item))


def expand(item: str) -> tuple[str, ...]:
    """ "moe x 3" -> ("moe", "moe", "moe"); "dense" -> ("dense",)."""
    name, _, times = item.partition(" x ")
    if times and not (times.strip().isdecimal() and int(times) > 0):
        raise RecipeError(f"cannot read {item!r}", "model.stack", "write a block name, or 'name x 12'")
    return (name.strip(),) * (int(times) if times else 1)
