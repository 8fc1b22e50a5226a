"""Context parallelism: the positions of each sequence shared by the ranks of the cp axis.

Everything between the attention cores works on one position at a time and needs nothing. Around a core stands an
exchange (parallel/attention), chosen for each layer by what the core declares and by its mask. No weight is split, so
FSDP spreads weights and sums gradients over dp_shard x cp. Where a block is recomputed, so is its exchange.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from shardforge.core.errors import ForgeError, LayoutError, Problems
from shardforge.core.layout import Layout
from shardforge.core.log import logger
from shardforge.nn.module import Module, declared, tagged
from shardforge.parallel.attention import chunks
from shardforge.parallel.attention.exchange import Exchange
from shardforge.parallel.attention.gather import Gather
from shardforge.parallel.attention.halo import Halo
from shardforge.parallel.attention.ring import Ring
from shardforge.parallel.attention.ulysses import Ulysses, misfit
from shardforge.parallel.mesh import Mesh

Method = Literal["auto", "gather", "ring", "ulysses"]
WAYS: dict[str, type[Exchange]] = {"gather": Gather, "halo": Halo, "ring": Ring, "ulysses": Ulysses}


def zigzag(length: int, cp: int, rank: int) -> Tensor:
    """Places [length / cp] of the tokens that a cp rank holds, see parallel.attention.chunks."""
    if cp > 1 and length % (2 * cp):
        fix = f"a multiple of {2 * cp}, like {max(1, length // (2 * cp)) * 2 * cp}"
        raise LayoutError(f"{length} tokens cannot be cut into 2 x {cp} chunks over cp", "train.seq_len", fix)
    return torch.arange(length) if cp == 1 else chunks.own(torch.arange(length), cp, rank, 0)


def apply(model: nn.Module, mesh: Mesh, method: Method, *, compiled: bool) -> None:
    """Put an exchange before every attention core. LayoutError where a mixer has none, or one that cannot do it.

    `compiled` says that the blocks will be; the compiler leaves out what it cannot follow.
    """
    check(model, mesh.layout, method)
    if mesh.layout.cp == 1:
        return
    ways: dict[str, Exchange] = {name: way(mesh.group("cp")) for name, way in WAYS.items()}
    for core in tagged(model, "core"):
        way = ways[chosen(core, method)]  # shared by equal cores, so that one compiled block serves all
        core.prepare, core.forward = partial(way.prepare, core), partial(way.forward, core)
        if compiled and not way.traced:
            core.forward = torch.compiler.disable(core.forward)


def chosen(core: Module, method: Method) -> str:
    """The way of one core. "auto" sends what a window reaches, or all keys; both are what a core calls "gather"."""
    if method == "auto":
        return "gather" if core.mask.window is None else "halo"
    return method


def describe(model: nn.Module, cp: int, method: Method, length: int) -> dict[str, str]:
    """Name of each attention core -> how it reaches the other positions of a sequence of `length` tokens."""
    cores = ((name, core) for name, core in model.named_modules() if isinstance(core, Module) and core.slot == "core")
    return {name: WAYS[chosen(core, method)].describe(core, cp, length) for name, core in cores}


def tell(model: nn.Module, layout: Layout, method: Method, length: int) -> None:
    """Log what `describe` says, equal layers together."""
    found = Counter(describe(model, layout.cp, method, length).values()) if layout.cp > 1 else {}
    for how, layers in found.items():
        logger("engine").info("cp=%d, %d of %d layers: %s", layout.cp, layers, sum(found.values()), how)


def check(model: nn.Module, layout: Layout, method: Method) -> None:
    """Every mixer that cannot share a sequence over cp this way, all of them in one error."""
    problems = list(_problems(model, layout, method)) if layout.cp > 1 else []
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise Problems(problems, f"context parallelism over cp={layout.cp}")


def _problems(model: nn.Module, layout: Layout, method: Method) -> Iterator[ForgeError]:
    without = f"parallel.cp: 1 keeps the same {layout.world_size} ranks with dp_shard={layout.dp_shard * layout.cp}"
    for name, mixer in model.named_modules():
        if not isinstance(mixer, Module) or mixer.slot != "mixer":
            continue
        kind, cores = type(mixer).__name__, list(tagged(mixer, "core"))
        if not cores:
            what = f"{kind} mixes positions without an attention core, and cp={layout.cp} ranks share each sequence"
            yield LayoutError(what, name, without)
        needed = "gather" if method == "auto" else method
        for core in cores:
            if needed not in core.exchanges:
                works = " or ".join(f"engine.context: {other}" for other in core.exchanges)
                what = f"the core {type(core).__name__} of {kind} cannot share a sequence by {needed}"
                yield LayoutError(what, name, f"{works}; {without}" if works else without)
        heads = [dim.count // layout.tp for item in declared(mixer) for dim in item.dims if dim.name == "heads"]
        wrong = [count for count in heads if count % layout.cp]
        if method == "ulysses" and wrong:
            yield misfit(wrong[0], layout.cp, name)
