"""Step 1 as it would be with a well-known mistake in it: other denominators, or sums over ranks that are left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shardforge.core.layout import Layout
from shardforge.nn.batch import IGNORE
from shardforge.parallel.context import zigzag
from shardforge.recipe.schema import Recipe
from shardforge.verify.measure import Key
from shardforge.verify.rows import batch

Step = dict[Key, Tensor]


def guesses(recipe: Recipe, layout: Layout, micro_batches: int) -> dict[str, Step]:
    """What the mistake is -> loss and gradients of step 1. Runs on one process, with the recipe of one process."""
    known: dict[bytes, tuple[Step, int]] = {}
    out = {}
    for name, shares in partitions(recipe, layout, micro_batches):
        parts = []
        for mask in shares if len(shares) > 1 else ():
            mark = mask.contiguous().numpy().tobytes()
            if mark not in known:
                known[mark] = mean(recipe, mask)
            parts.append(known[mark])
        if parts:
            told = f"each {name} divides by the number of its own scored labels; divide by that of the whole batch"
            out[told] = added((step, 1 / len(parts)) for step, _ in parts)
            if "rank" in name:
                first, labels = parts[0]
                share = added([(first, labels / sum(count for _, count in parts))])
                whole = added((step, count / sum(count for _, count in parts)) for step, count in parts)
                loss = {key: value for key, value in whole.items() if key[1] == "loss"}
                out[f"gradients are not summed over {name}s: rank 0 has that of its own share"] = {**share, **loss}
    return out


def partitions(recipe: Recipe, layout: Layout, micro_batches: int) -> Iterator[tuple[str, list[Tensor]]]:
    """Ways to cut the batch into shares, each as a mask [b, s]."""
    rows, length = recipe.train.sequences, recipe.train.seq_len
    ranks = blocks(rows, layout.data_ranks)
    pieces = blocks(rows, layout.data_ranks * micro_batches)
    columns = [torch.zeros(length, dtype=torch.bool) for _ in range(layout.cp)]
    for rank, mask in enumerate(columns):
        mask[zigzag(length, layout.cp, rank)] = True

    def whole_rows(masks: Sequence[Tensor]) -> list[Tensor]:
        return [mask[:, None].expand(rows, length) for mask in masks]

    yield "data rank", whole_rows(ranks)
    if layout.cp > 1:
        yield "cp rank", [column.expand(rows, length) for column in columns]
        if layout.data_ranks > 1:
            yield "data and cp rank", [rank[:, None] & column for rank in ranks for column in columns]
    if micro_batches > 1:
        together = [torch.stack(pieces[number::micro_batches]).any(0) for number in range(micro_batches)]
        yield "micro-batch", whole_rows(together)
        yield "micro-batch of a data rank", whole_rows(pieces)


def blocks(rows: int, parts: int) -> list[Tensor]:
    """Masks [rows] of equal runs of rows."""
    return [torch.arange(rows) * parts // rows == part for part in range(parts)]


def mean(recipe: Recipe, mask: Tensor) -> tuple[Step, int]:
    """Loss and gradients as means over the labels of one share, and how many it has."""
    whole = batch(recipe, 0)
    engine = recipe.engine.build(recipe, torch.device("cpu"))
    losses = engine.forward_backward(dataclasses.replace(whole, labels=torch.where(mask, whole.labels, IGNORE)), 0)
    found: Step = {("step 1", "loss", ""): torch.tensor(losses.loss, dtype=torch.float64)}
    found |= {("step 1", "gradient", name): grad for name, grad in engine.gradients().items()}
    return found, losses.scored


def added(parts: Iterable[tuple[Mapping[Key, Tensor], float]]) -> Step:
    """The sum of steps, each times a factor."""
    total: Step = {}
    for step, factor in parts:
        total = {key: total.get(key, 0) + factor * value for key, value in step.items()}
    return total
