"""The loss of the dense source and of the result on a text, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardforge.core.errors import DataError
from shardforge.data import tokenizer as tokenizers
from shardforge.families.open import open_source
from shardforge.families.source import Source
from shardforge.families.streamed import NORM, Streamed
from shardforge.upcycle import report
from shardforge.upcycle.run import Upcycled

LENGTH, SEQUENCES = 512, 8


def compare(path: Path, made: Upcycled, text: Path, tokenizer: Path) -> dict[str, Any]:
    """Mean loss of both in float32, in nats a token, over the first SEQUENCES * LENGTH tokens; the report keeps it."""
    source, result = open_source(path), open_source(made.step)
    tokens = tokenized(text, tokenizer, int(source.model["vocab"]))
    found = {
        "text": text.name,
        "tokens": (tokens.shape[1] - 1) * tokens.shape[0],
        "dense": loss(source, tokens),
        "moe": loss(result, tokens),
    }
    report.save(made.path, {**made.report, "loss": found})
    return found


def tokenized(text: Path, tokenizer: Path, vocab: int) -> Tensor:
    """The beginning of a text as token ids [sequences, length + 1]; less of both when it is short."""
    try:
        content = text.read_text(encoding="utf-8")[: LENGTH * SEQUENCES * 32]
    except UnicodeDecodeError as cause:
        raise DataError(f"byte {cause.start} is not UTF-8", text, "name a text file") from cause
    ids = torch.tensor(tokenizers.load(tokenizer).encode(content, add_special_tokens=False).ids, dtype=torch.int64)
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens", text, "name a longer text")
    if int(ids.max()) >= vocab:
        what = f"the tokenizer gives token {int(ids.max())} and the model's table has {vocab} rows"
        raise DataError(what, tokenizer, "name the model's own tokenizer.json with --tokenizer")
    length = min(LENGTH, len(ids) - 1)
    rows = max(1, min(SEQUENCES, len(ids) // (length + 1)))
    return ids[: rows * (length + 1)].view(rows, length + 1)


@torch.no_grad()
def loss(source: Source, tokens: Tensor) -> float:
    """Mean loss of a source's model in float32, nats a token; of the model one block is in memory at a time."""
    model, labels = Streamed(source, tokens[:, :-1]), tokens[:, 1:].flatten()
    with model.embedding():
        streams = [model.embedded(row) for row in range(tokens.shape[0])]
    for layer in range(model.layers):
        with model.held(f"blocks.{layer}"):
            streams = [model.block(layer, x) for x in streams]
    with model.held(NORM):
        normed = model.norm(torch.cat(streams)).flatten(0, 1)
    total, wanted = torch.full(labels.shape, -torch.inf), torch.zeros(labels.shape)
    first = 0
    for logits in model.logits(normed, source.read(model.head)):
        place = labels - first
        here = (place >= 0) & (place < logits.shape[1])
        wanted[here] = logits[here, place[here]]
        total = torch.logaddexp(total, logits.logsumexp(-1))
        first += logits.shape[1]
    return float((total - wanted).double().mean())
