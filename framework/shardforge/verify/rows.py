"""Batches in which everything that tells ranks apart is uneven: documents, padding, and how many labels each has."""

from __future__ import annotations

import torch

from shardforge.nn.batch import IGNORE, PADDING, Batch
from shardforge.recipe.schema import Recipe


def batch(recipe: Recipe, step: int) -> Batch:
    """The whole batch of a step, [sequences, seq_len], from random tokens; the same in every process.

    Rows hold one to four documents (one where the recipe joins them). The second row ends in padding, the last one is
    all padding where there are four or more. Scored labels grow with the row and with the place in it, so that a
    mean over a rank's labels is never the mean over all.
    """
    rows, length = recipe.train.sequences, recipe.train.seq_len
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (rows, length)
    tokens = torch.randint(0, recipe.model.vocab, shape, generator=generator)
    labels = torch.randint(0, recipe.model.vocab, shape, generator=generator)
    documents, positions = torch.zeros(shape, dtype=torch.int64), torch.arange(length).repeat(rows, 1)
    for row in range(rows):
        if recipe.data.documents == "isolated":
            for cut in sorted({(5 + 7 * row + step) % length, (3 + 11 * row) % length, length // 2 + row % 3}):
                documents[row, cut:] += 1
                positions[row, cut:] = torch.arange(length - cut)
        early = torch.arange(length) < length // 3
        likely = torch.rand(length, generator=generator) + 0.5 * early
        labels[row, likely.topk(round(0.85 * length * (1 - row / rows) ** 1.3)).indices] = IGNORE
    if rows > 1:
        pad(tokens, labels, documents, 1, length - length // 4)
    if rows > 3:
        pad(tokens, labels, documents, rows - 1, 0)
        positions[-1] = torch.arange(length)
    return Batch(tokens, labels, positions, documents, torch.arange(rows))


def pad(tokens: torch.Tensor, labels: torch.Tensor, documents: torch.Tensor, row: int, start: int) -> None:
    tokens[row, start:], labels[row, start:], documents[row, start:] = 0, IGNORE, PADDING


def part(whole: Batch, rank: int, ranks: int) -> Batch:
    """The rows of one data rank."""
    return list(whole.split(len(whole) // ranks))[rank]
