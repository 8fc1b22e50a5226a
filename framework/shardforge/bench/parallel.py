"""What the machinery costs: a step of the native engine on two local ranks, beside the same step written by hand.

Both start from the same weights and must give the same loss in the first three steps before their times count. Steps
alternate within the same processes, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shardforge.bench.by_hand import Sizes
from shardforge.bench.by_hand_layouts import LAYOUTS
from shardforge.bench.cost import Cost
from shardforge.bench.peers import OlmoCore
from shardforge.bench.step import synthetic
from shardforge.core.errors import EngineError
from shardforge.core.layout import Layout
from shardforge.model.build import build
from shardforge.nn.batch import Batch
from shardforge.nn.init import fill
from shardforge.nn.module import declared
from shardforge.parallel.pool import Pool
from shardforge.recipe.load import from_mapping
from shardforge.recipe.schema import Recipe

KNOWN = tuple(LAYOUTS)
PEERED = ("tp2", "dp2")


@dataclass(frozen=True)
class Shape:
    hidden: int = 256
    heads: int = 8
    inner: int = 704
    vocab: int = 4096
    layers: int = 4
    sequences: int = 8
    length: int = 256
    experts: int = 8  # of width inner / 4, two a token, where the layout has ep


def recipe(layout: Layout, shape: Shape) -> Recipe:
    ffn: dict[str, Any] = {"kind": "glu", "inner": shape.inner}
    if layout.ep > 1:
        ffn = {"kind": "moe", "experts": shape.experts, "k": 2, "inner": shape.inner // 4}
    width = shape.hidden // shape.heads
    block = {"mixer": {"kind": "gqa", "heads": shape.heads, "head_dim": width}, "ffn": ffn}
    train: dict[str, Any] = {"steps": 1000, "sequences": shape.sequences, "seq_len": shape.length}
    if layout.pp > 1:
        train["micro_batch"] = shape.sequences // 4
    return from_mapping(
        {
            "name": f"bench-{layout}",
            "model": {
                "vocab": shape.vocab,
                "hidden": shape.hidden,
                "blocks": {"block": block},
                "stack": [f"block x {shape.layers}"],
            },
            "data": {"sources": [{"path": "none"}]},
            "optim": {"kind": "adamw", "weight_decay": 0.0},
            "schedule": {"kind": "constant", "lr": 1e-3},
            "precision": {"master": "fp32", "compute": "fp32", "reduce": "fp32"},
            "parallel": layout.degrees(),
            "engine": {"kind": "native", "zero": 2},
            "train": train,
        }
    ).recipe


def measure(text: str, shape: Shape, pairs: int, peer: bool) -> Cost:
    """On each rank: the steps in turn, `pairs` times after three untimed ones."""
    layout = Layout.parse(text)
    made = recipe(layout, shape)
    engine = made.engine.build(made, torch.device("cpu"))
    sizes, hand = by_hand(made, layout, shape)
    rank, ranks = layout.data_rank(dist.get_rank()), layout.data_ranks
    batches = [list(single(synthetic(made, n)).split(shape.sequences // ranks))[rank] for n in range(3)]

    def ours(batch: Batch, index: int) -> float:
        found = engine.forward_backward(batch, index).loss
        engine.update(1e-3)
        return found

    others: dict[str, Callable[[Batch, int], float]] = {"by hand": lambda batch, _: hand.step(batch)}
    if peer and text in PEERED:
        olmo = OlmoCore(sizes, text, shape.length)
        others["OLMo-core"] = lambda batch, _: olmo.step(batch)
    for index in range(3):
        found = {"ours": ours(batches[index], index)} | {n: f(batches[index], index) for n, f in others.items()}
        if not math.isclose(found["ours"], found["by hand"], rel_tol=1e-4):
            raise EngineError(f"the two steps differ: losses {found}", f"step {index} of {text}")
    times: dict[str, list[float]] = {"ours": [], **{name: [] for name in others}}
    for index in range(pairs):
        turn = list(({"ours": ours} | others).items())
        for name, step in turn[index % len(turn) :] + turn[: index % len(turn)]:
            gc.collect()
            dist.barrier()
            begun = time.perf_counter()
            step(batches[index % 3], index + 3)
            dist.barrier()
            times[name].append(time.perf_counter() - begun)
    mine = times.pop("ours")
    ratios = {name: statistics.median(a / b for a, b in zip(mine, t, strict=True)) for name, t in times.items()}
    least = {name: min(t) for name, t in times.items()}
    return Cost(min(mine), least, {name: min(mine) / t for name, t in least.items()}, ratios)


def by_hand(made: Recipe, layout: Layout, shape: Shape) -> tuple[Sizes, Any]:
    """The hand-written step of a layout, from the weights that the recipe's seed gives."""
    model = build(made.model, made.objective.build())
    model.to_empty(device="cpu")
    fill(model, made.seed)
    items = list(declared(model))
    split = {item.fqn: layout.split(item.dims)["tp"] for item in items if "tp" in layout.split(item.dims)}
    experts = shape.experts if layout.ep > 1 else 0
    inner = shape.inner // 4 if experts else shape.inner
    width = shape.hidden // shape.heads
    sizes = Sizes(shape.hidden, shape.heads, width, inner, shape.vocab, shape.layers, experts)
    return sizes, LAYOUTS[str(layout)](sizes, {item.fqn: item.weight.detach() for item in items}, split)


def single(batch: Batch) -> Batch:
    """The same tokens as one document a row, which every peer understands."""
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).contiguous()
    return dataclasses.replace(batch, positions=positions, documents=torch.zeros_like(batch.tokens))


def run(
    layouts: list[str], shape: Shape, pairs: int, tell: Callable[[str], None], *, peer: bool = False
) -> dict[str, Cost]:
    """One pool of two ranks for all; layout -> what the first rank measured."""
    if unknown := [text for text in layouts if text not in LAYOUTS]:
        raise EngineError(f"no hand-written step for {unknown[0]}", "bench parallel", f"choose of {', '.join(KNOWN)}")
    if pairs < 1:
        raise EngineError(f"{pairs} pairs of steps have no time", "--pairs", "give at least 1")
    out: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(2, Path(folder), timeout_s=3600)
        try:
            for text in layouts:
                cost = out[text] = pool.run(measure, text, shape, pairs, peer)[0]
                for name, seconds in cost.theirs.items():
                    tell(
                        f"{text}: ours {cost.ours * 1e3:.1f} ms, {name} {seconds * 1e3:.1f} ms, ratio "
                        f"{cost.fastest[name]:.3f} of the fastest steps, {cost.median[name]:.3f} in the median pair"
                    )
        finally:
            pool.stop()
    return out
