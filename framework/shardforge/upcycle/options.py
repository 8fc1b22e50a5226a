"""What an upcycling may say: read from a small YAML file and from the command line, checked like a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shardforge.core.errors import Problems, RecipeError
from shardforge.core.options import option
from shardforge.recipe.build import build
from shardforge.recipe.provenance import inline, plain
from shardforge.recipe.tree import Node, Origin, merge, override, read, wrap
from shardforge.upcycle.method import Method

SECTION = "upcycle"


@dataclass(frozen=True, kw_only=True)
class Options:
    method: Method = option("drop", "how an expert comes from the dense ffn")
    experts: int = option(8, "experts of each converted layer", at_least=1)
    k: int = option(2, "experts that a token goes through", at_least=1)
    expert_ffn: int | None = option(None, "neurons of one expert; empty: as many as the dense ffn has", at_least=1)
    shared: int = option(
        0, "neurons of an ffn for every token: the dense ffn's first ones, never drawn anew", unit="neurons", at_least=0
    )
    layers: str = option("all", "which layers: all, 'every 2' (the 2nd, 4th, ...), or indices from 0 like '4-11,20'")
    gate: Literal["renormalized", "raw", "topk_first"] = option(
        "renormalized",
        "weights of the chosen: renormalized: softmax over all, divided by their sum; raw: softmax over all as it is; "
        "topk_first: softmax over the chosen",
    )
    scale: Literal["auto", "none", "virtual_group"] = option(
        "auto",
        "virtual_group: expert weights times what makes up for the gates; auto: only with the method of that name",
    )
    router_init: Literal["uniform_zero_mean", "normal_002", "uniform", "normal_02887"] = option(
        "uniform_zero_mean",
        "router rows: uniform_zero_mean: (U - mean(U)) * 0.02 * sqrt(12); normal_002: N(0, 0.02^2); uniform: U(0, 1); "
        "normal_02887: N(0, 0.2887^2)",
    )
    balance: float = option(
        0.02, "factor of the balance loss over all layers, in units where k is balanced; 0 leaves it out", at_least=0
    )
    seed: int = option(1234, "the one seed: neurons, noise and router rows follow from it", at_least=0)
    dtype: Literal["source", "bf16", "fp32"] = option("source", "type of the weights; source keeps each one's own")
    moments: Literal["drop", "carry"] = option(
        "drop", "carry: what the optimizer kept for copied numbers comes along, and is 0 for those drawn anew"
    )


@dataclass(frozen=True, kw_only=True)
class Document:
    upcycle: Options = option(Options(), "how to make a mixture of experts of a dense model")


@dataclass(frozen=True)
class Given:
    """Options, and where each of them was written."""

    options: Options
    origins: Mapping[str, Origin]

    def where(self, field: str) -> str:
        origin = self.origins.get(f"{SECTION}.{field}", "default")
        return f"{origin}  {SECTION}.{field}"


def read_options(config: Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()) -> Given:
    """Options of a YAML file with a section `upcycle`, under `flags` by field, under `sets` like "k=4".

    Problems lists everything that is wrong at once.
    """
    problems: list[RecipeError] = []
    tree = Node({}, Origin("options"))
    if config is not None:
        tree, problems = read(config, _no_bases)
    if flags:
        tree = merge(tree, wrap({SECTION: flags}, Origin("command line")))
    for text in sets:
        try:
            tree = override(tree, f"{SECTION}.{text}")
        except RecipeError as error:
            problems.append(error)
    try:
        document, origins = build(Document, tree, problems)
    except Problems as found:
        raise Problems(found.problems, "the options") from None
    return Given(document.upcycle, origins)


def dump(options: Options) -> str:
    """YAML that `--config` reads back to the same options."""
    lines = [f"{SECTION}:"]
    for name, value in plain(options).items():
        lines.append(f"  {name}: {inline(value)}")
    return "\n".join(lines) + "\n"


def chosen(text: str, layers: int) -> tuple[int, ...]:
    """Layer indices that `text` names, ascending. ValueError says what cannot be read."""
    words = text.split()
    if words == ["all"]:
        return tuple(range(layers))
    if len(words) == 2 and words[0] == "every" and words[1].isdecimal() and int(words[1]) > 0:
        return tuple(range(int(words[1]) - 1, layers, int(words[1])))
    found: set[int] = set()
    for item in text.replace(" ", "").split(","):
        first, _, last = item.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"{text!r} names no layers")
        found |= set(range(int(first), int(last or first) + 1))
    if beyond := sorted(index for index in found if index >= layers):
        raise ValueError(f"layer {beyond[0]} of a model whose layers are 0 to {layers - 1}")
    if not found:
        raise ValueError(f"{text!r} names no layers")
    return tuple(sorted(found))


def _no_bases(name: str) -> Path:
    raise RecipeError(f"there is no file {name!r}", "base", "name it relative to this file")
