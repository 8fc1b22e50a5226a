"""The loss of the dense source and of the result on a text, before the first step. Both are held whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from shardforge.core.errors import CheckpointError, DataError
from shardforge.core.slots import objectives
from shardforge.core.units import bytes_
from shardforge.data import tokenizer as tokenizers
from shardforge.families.open import open_source
from shardforge.families.source import Source
from shardforge.model.build import build
from shardforge.nn.batch import IGNORE
from shardforge.nn.sequence import Sequence
from shardforge.upcycle import report
from shardforge.upcycle.run import Upcycled
from shardforge.upcycle.target import config

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
    """Mean loss of a source's model in float32, nats a token, one sequence after another."""
    model = build(config(source.model, str(source.path)), objectives["next_token"]().build(), torch.float32)
    size, room = 4 * sum(weight.numel() for weight in model.parameters()), psutil.virtual_memory().available
    if size > room:
        what = f"its weights in float32 take {bytes_(size)}, and {bytes_(room)} of memory are free"
        raise DataError(what, source.path, "leave --text out; the weights themselves are written already")
    model.to_empty(device="cpu")
    _fill(dict(model.named_parameters()) | dict(model.named_buffers()), source.names, source.read)
    model.eval()
    total, scored = 0.0, 0
    for row in tokens:
        labels = row[None, 1:]
        place = torch.arange(labels.shape[1])[None]
        seq = Sequence(place, torch.zeros_like(place), torch.zeros(1, dtype=torch.int64))
        total += float(model(row[None, :-1], seq, labels)["loss"])
        scored += int((labels != IGNORE).sum())
    return total / scored


def _fill(tensors: Mapping[str, Tensor], names: Mapping[str, Any], read: Callable[[str], Tensor]) -> None:
    if missing := sorted(names.keys() - tensors.keys()):
        raise CheckpointError(f"{missing[0]} has no place in the model", "", "report this")
    for name, tensor in tensors.items():
        if name in names:
            tensor.detach().copy_(read(name))
