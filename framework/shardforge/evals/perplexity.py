"""Held-out loss of a trained run, in nats per token and bits per byte."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shardforge.data.loader import Loader
from shardforge.evals.open import Trained
from shardforge.nn.batch import IGNORE
from shardforge.nn.sequence import Sequence


@dataclass(frozen=True)
class HeldOut:
    loss: float  # nats per scored token
    tokens: int  # scored
    unigram: float | None  # nats per token of a model that knows only token frequencies
    bits_per_byte: float | None  # None for several corpora, or none held out


@torch.no_grad()
def held_out(trained: Trained, sequences: int) -> HeldOut:
    """Mean loss over the first `sequences` held-out samples, the same that training evaluates."""
    recipe = trained.recipe
    loader = Loader(recipe.data, recipe.train, recipe.seed, vocab=recipe.model.vocab)
    total, scored = 0.0, 0
    for batch in loader.held_out_batches(sequences):
        for piece in batch.to(trained.device).split(recipe.train.micro_batch or len(batch)):
            seq = Sequence(piece.positions, piece.documents, piece.rows, dtype=trained.tables)
            total += trained.model(piece.tokens, seq, piece.labels)["loss"].item()
            scored += int((piece.labels != IGNORE).sum())
    loader.close()
    manifest = trained.corpus.manifest
    loss, single = total / max(1, scored), len(recipe.data.sources) == 1
    per_byte = manifest.tokens("held_out") / max(1, manifest.text_bytes.get("held_out", 0))
    return HeldOut(
        loss, scored, manifest.unigram_nats if single else None, loss / math.log(2) * per_byte if single else None
    )
