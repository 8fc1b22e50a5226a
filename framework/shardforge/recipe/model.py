"""The model part of a recipe: named blocks, and a stack that says how often each one comes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shardforge.core.errors import RecipeError
from shardforge.core.options import REQUIRED, option
from shardforge.core.phases import Phases
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
class MTPConfig:
    depth: int = option(1, "tokens behind the next one that are predicted, each by a module of its own", at_least=0)
    block: str = option(REQUIRED, "name of the block in each module")
    concat: Literal["embed_first", "hidden_first"] = option(
        "embed_first",
        "which half of a module's input is the embedding; the paper writes hidden_first, its released "
        "weights are embed_first",
    )
    hidden: Literal["before_norm", "after_norm"] = option(
        "before_norm",
        "what a module reads of the one before it, or of the last layer: before_norm as in the paper; after_norm what "
        "the head reads, as transformers and Megatron-LM do",
    )
    norm: Norm = option("rmsnorm", "the norms on a module's two inputs, and the one before the head")
    weight: float | Phases = option(0.3, "factor of the mean of the modules' losses in the loss", at_least=0)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    vocab: int = option(REQUIRED, "rows of the embedding table; at least the vocabulary of the tokenizer", at_least=2)
    hidden: int = option(REQUIRED, "width of the residual stream", at_least=1)
    embedding: Embedding = option("token", "token ids to vectors")
    blocks: Mapping[str, BlockConfig] = option(REQUIRED, "the kinds of block, by name")
    stack: tuple[str, ...] = option(
        REQUIRED, "order of the blocks from the first layer on, like [dense, moe x 26] or ['(near far) x 12']"
    )
    norm: Norm = option("rmsnorm", "the norm before the head")
    head: Head = option("linear", "vectors to logits")
    mtp: MTPConfig | None = option(None, "modules that predict further tokens in training, as in DeepSeek-V3")
    dropout: float = option(0.0, "share of the embedded vectors set to zero in training", at_least=0, at_most=0.99)
    core: Core = option("auto", "how attention is computed; the result is the same for each")
    init: InitConfig = option(InitConfig(), "how weights start")

    @property
    def layers(self) -> tuple[str, ...]:
        """Block name of every layer, first to last."""
        return tuple(name for item in self.stack for name in expand(item))


def expand(item: str) -> tuple[str, ...]:
    """Block names of one item of a stack: "dense" is one layer, "moe x 3" three of them, "(near far) x 2" near, far,
    near, far. Items in parentheses stand beside each other and may be repeated and nested themselves."""
    if "(" in item or ")" in item:
        names, rest = _unit(re.findall(r"[()]|[^\s()]+", item))
    else:
        name, _, times = item.partition(" x ")
        count = int(times) if times.strip().isdecimal() else 0
        names, rest = ((name.strip(),) if name.strip() else ()) * (count if times else 1), []
    if not names or rest:
        fix = "write a block name, 'name x 12' or '(one another) x 12'"
        raise RecipeError(f"cannot read {item!r}", "model.stack", fix)
    return names


def _unit(tokens: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """The layers of the first item of `tokens`, none where it cannot be read, and the tokens after it."""
    if not tokens or tokens[0] == ")":
        return (), tokens
    names: tuple[str, ...] = (tokens[0],)
    rest = tokens[1:]
    if tokens[0] == "(":
        names = ()
        while rest and rest[0] != ")":
            inner, rest = _unit(rest)
            if not inner:
                return (), rest
            names += inner
        if not rest:
            return (), rest
        rest = rest[1:]
    if rest and rest[0] == "x":
        times = rest[1] if len(rest) > 1 and rest[1].isdecimal() else "0"
        return names * int(times), rest[2:]
    return names, rest
