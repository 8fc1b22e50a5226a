"""Tiny models that predict further tokens, and what their heads read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardforge.model.build import build
from shardforge.model.decoder import Decoder
from shardforge.nn.batch import Batch
from shardforge.nn.init import fill
from shardforge.nn.sequence import Sequence
from tests.tiny import LENGTH, VOCAB, tiny

DEPTH = 2
MTP = {"block": "one", "depth": DEPTH}


def made(mtp: dict[str, Any] | None = MTP, **changes: Any) -> Decoder:
    recipe = tiny(**changes | {"model": changes.get("model", {}) | {"mtp": mtp}})
    model = build(recipe.model, recipe.objective.build(), torch.float64)
    model.to_empty(device="cpu")
    fill(model, 1)
    return model


def sequence(given: Batch, progress: float = 0.0, key: int | None = None) -> Sequence:
    where = given.positions, given.documents, given.rows
    chance = None if key is None else torch.tensor(key)
    return Sequence(*where, chance, torch.float64, ahead=given.ahead, progress=progress)


def run(model: Decoder, given: Batch, **options: Any) -> dict[str, Tensor]:
    return model(given.tokens, sequence(given.look_ahead(DEPTH), **options), given.labels)


def read(model: Decoder, given: Batch) -> list[Tensor]:
    """What the head is given for the next token, and for each further one."""
    seen: list[Tensor] = []
    handle = model.objective.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    run(model, given)
    handle.remove()
    return seen


def one_document() -> Batch:
    """Two rows of one document each, whose labels are the next tokens."""
    tokens = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    place = torch.arange(LENGTH).expand(2, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], place, torch.zeros_like(place), torch.arange(2))
