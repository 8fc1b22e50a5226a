"""Weights, work and cache of a model, counted on its modules without storage.

`active` counts what one token meets: every weight but those of the experts that it is not sent to, embedding and head
whole. `active_nonembedding` leaves embedding, learned positions and head out. Modules that predict tokens behind the
next one are counted apart. FLOP are those of `model.flops`: forward and backward of one sequence that is one document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn

from shardforge.core import units
from shardforge.core.errors import RecipeError
from shardforge.model import flops
from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.module import Declared, declared, tagged
from shardforge.plan.schedule import columns
from shardforge.recipe.schema import Recipe

CACHE_BYTES = 2
CACHE_TYPE = "bf16"


@dataclass(frozen=True)
class BlockParams:
    """One layer of a named block; `stands` says which layers it is."""

    name: str
    stands: str
    layers: int
    total: int
    active: int
    mixer: int
    ffn: int
    cache_numbers: int  # a token


@dataclass(frozen=True)
class Params:
    """Numbers of weights, tied ones once; FLOP of forward and backward; bytes of a cache of keys and values."""

    name: str
    total: int
    active: int
    active_nonembedding: int
    embedding: int
    head: int
    routers: int
    mtp_total: int
    mtp_active: int
    buffers: int
    seq_len: int
    flops_per_token: float
    kv_bytes_per_token: int
    kv_bytes_per_sequence: int  # of seq_len tokens; a window keeps only what it sees
    kv_type: str
    blocks: tuple[BlockParams, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def params(recipe: Recipe, seq_len: int | None = None) -> Params:
    """The numbers of a recipe's model at sequences of `seq_len` tokens, or the recipe's.

    RecipeError for more tokens than the embedding has positions.
    """
    places = getattr(recipe.model.embedding, "length", None)
    length = seq_len or (recipe.train.seq_len if places is None else min(recipe.train.seq_len, places))
    if places is not None and length > places:
        what = f"a sequence of {length} tokens is longer than the {places} positions of model.embedding"
        raise RecipeError(what, "--seq-len", f"at most {places}")
    model = build(recipe.model, recipe.objective.build())
    apart = flops.further(model)
    trunk = [item for item in declared(model) if item.module not in apart]
    mtp = [item for item in declared(model) if item.module in apart]
    embedding = _size(_inside(trunk, model, "embed"))
    head = _size(_inside(trunk, model, "head"))
    active = _active(model, trunk)
    mixers = [mixer for mixer in tagged(model, "mixer") if mixer not in apart]
    return Params(
        name=recipe.name,
        total=_size(trunk),
        active=active,
        active_nonembedding=active - embedding - head,
        embedding=embedding,
        head=head,
        routers=_size(item for item in trunk if flops.routes(item)),
        mtp_total=_size(mtp),
        mtp_active=_active(model, mtp),
        buffers=sum(_remembered(module) for module in model.modules() if module not in apart),
        seq_len=length,
        flops_per_token=flops.step_flops(model, length) / length,
        kv_bytes_per_token=CACHE_BYTES * sum(mixer.cache_numbers for mixer in mixers),
        kv_bytes_per_sequence=CACHE_BYTES * sum(mixer.cache_numbers * _kept(mixer, length) for mixer in mixers),
        kv_type=CACHE_TYPE,
        blocks=_blocks(model, recipe.model.layers),
    )


def _size(items: Iterable[Declared]) -> int:
    return sum(item.count for item in items)


def _active(model: nn.Module, items: Iterable[Declared]) -> int:
    """Of weights over experts, vectors included, what the chosen ones of a token hold; the others whole. Rounded, where
    a token meets a share of an expert on average."""
    chosen = {module: module.chosen for module in tagged(model, "experts")}
    out = 0.0
    for item in items:
        share = chosen.get(item.module)
        out += item.count if share is None else item.count // item.dims[0].size * share
    return round(out)


def _inside(items: Iterable[Declared], model: nn.Module, slot: str) -> list[Declared]:
    """Weights of the modules that fill a slot."""
    modules = {inner for module in tagged(model, slot) for inner in module.modules()}
    return [item for item in items if item.module in modules]


def _remembered(module: nn.Module) -> int:
    return sum(getattr(module, name).numel() for name in module.__dict__.get("remembered", ()))


def _kept(mixer: nn.Module, length: int) -> int:
    """Tokens of a sequence that a cache must hold."""
    return min(length, mixer.core.mask.window or length)


def _blocks(model: Decoder, layers: Sequence[str]) -> tuple[BlockParams, ...]:
    """One of each kind of block, in order of appearance."""
    out = []
    for name in dict.fromkeys(layers):
        block = model.blocks[str(layers.index(name))]
        items = list(declared(block))
        out.append(
            BlockParams(
                name=name,
                stands=spans(index for index, layer in enumerate(layers) if layer == name),
                layers=layers.count(name),
                total=_size(items),
                active=_active(block, items),
                mixer=_size(declared(block.mixer)),
                ffn=_size(declared(block.ffn)),
                cache_numbers=block.mixer.cache_numbers,
            )
        )
    return tuple(out)


def spans(indices: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"; every other one of many -> "0 2 4 ... 22"."""
    runs = [[index for _, index in group] for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return " ".join(shown if len(shown) <= 6 else [*shown[:3], "...", shown[-1]])


def table(found: Params) -> list[str]:
    """The numbers as lines for people."""
    rows = [
        ("total", f"{found.total:,}", "weights; tied ones once"),
        ("active", f"{found.active:,}", "of these met by one token; embedding and head whole"),
        ("active_nonembedding", f"{found.active_nonembedding:,}", "of these outside embedding and head"),
        ("embedding", f"{found.embedding:,}", "learned positions included"),
        ("head", f"{found.head:,}", "" if found.head else "the embedding's"),
    ]
    if found.routers:
        rows.append(("routers", f"{found.routers:,}", "in active, not in FLOP"))
    if found.mtp_total:
        rows.append(("mtp_total", f"{found.mtp_total:,}", "beside total: modules that predict further tokens"))
        rows.append(("mtp_active", f"{found.mtp_active:,}", "beside active"))
    if found.buffers:
        rows.append(("buffers", f"{found.buffers:,}", "remembered numbers that are no weights"))
    flop = f"{units.count(found.flops_per_token)}FLOP"
    cache = units.bytes_(found.kv_bytes_per_sequence)
    rows.append(
        ("flops_per_token", f"{found.flops_per_token:,.0f}", f"{flop}, forward and backward, masked pairs only")
    )
    rows.append(("kv_bytes_per_token", f"{found.kv_bytes_per_token:,}", f"in {found.kv_type}; a sequence {cache}"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {number:>{widths[1]}}  {note}".rstrip() for name, number, note in rows]
    heading = ("block", "layers", "total", "active", "mixer", "ffn", "cache", "which")
    blocks = []
    for each in found.blocks:
        numbers = (each.layers, each.total, each.active, each.mixer, each.ffn, each.cache_numbers)
        blocks.append((each.name, *(f"{number:,}" for number in numbers), each.stands))
    return [f"{found.name}, sequences of {found.seq_len:,} tokens", "", *lines, "", *columns([heading, *blocks])]
