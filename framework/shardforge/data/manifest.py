"""`manifest.json`: what a built corpus consists of. It is written last, so a folder that has one is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shardforge.core.errors import DataError

FILE = "manifest.json"
FORMAT = 1
SPLITS = ("train", "held_out")
WORK = ".build"
"""Folder inside the output that an unfinished build leaves, and continues from."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    name: str  # of NAME.bin, NAME.idx and NAME.names
    tokens: int
    documents: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    file: str
    sha256: str
    vocab: int
    eos: int  # ends every document


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """What was read and left out."""

    invalid: int = 0  # documents that are not text
    empty: int = 0  # documents of no characters
    ignored: int = 0  # files of a folder whose ending names no known text format
    examples: tuple[str, ...] = ()  # the first invalid documents, with the reason


@dataclass(frozen=True, kw_only=True)
class Manifest:
    tokenizer: TokenizerRecord
    dtype: str  # "uint16" or "int32"
    splits: Mapping[str, tuple[ShardRecord, ...]]
    text_bytes: Mapping[str, int]  # UTF-8 bytes of each split's documents, for bits per byte
    entropy_nats: float  # per token of the train split, under its own token frequencies
    unigram_nats: float | None  # cross entropy of held-out tokens under train frequencies, one added to each count
    skipped: Skipped = Skipped()
    digest: str = ""  # of inputs and options, to recognise a finished build
    inputs: tuple[str, ...] = ()
    format: int = FORMAT
    totals: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits.get(split, ()))

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits.get(split, ()))


def fingerprint(manifest: Manifest) -> str:
    """16 hex digits that change with any token of any split or with the tokenizer."""
    total = hashlib.sha256(manifest.tokenizer.sha256.encode())
    for split in SPLITS:
        for shard in manifest.splits.get(split, ()):
            total.update(f"{split} {shard.bin_sha256} {shard.idx_sha256}".encode())
    return total.hexdigest()[:16]


def write(folder: Path, manifest: Manifest) -> None:
    """Commit the corpus in `folder`: the manifest appears whole or not at all."""
    content = dataclasses.asdict(manifest)
    content["totals"] = {
        split: {"shards": len(shards), "tokens": manifest.tokens(split), "documents": manifest.documents(split)}
        for split, shards in manifest.splits.items()
    }
    replace(folder / FILE, json.dumps(content, indent=1).encode())


def read(folder: Path) -> Manifest:
    """The manifest of a built corpus, or a DataError that says how to get one."""
    path = folder / FILE
    if not path.is_file():
        raise _absent(folder)
    try:
        raw = json.loads(path.read_bytes())
    except ValueError as cause:
        raise DataError(f"cannot be read as JSON: {cause}", path, "build the corpus again") from cause
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise DataError(f"format {found!r}, this version reads format {FORMAT}", path, "build the corpus again")
    try:
        return _from(raw)
    except (KeyError, TypeError, AttributeError) as cause:
        raise DataError(f"incomplete: {cause!r}", path, "build the corpus again") from cause


def _from(raw: dict[str, Any]) -> Manifest:
    return Manifest(
        **{
            **raw,
            "tokenizer": TokenizerRecord(**raw["tokenizer"]),
            "splits": {
                split: tuple(ShardRecord(**shard) for shard in shards) for split, shards in raw["splits"].items()
            },
            "skipped": Skipped(**{**raw["skipped"], "examples": tuple(raw["skipped"]["examples"])}),
            "inputs": tuple(raw["inputs"]),
        }
    )


def _absent(folder: Path) -> DataError:
    if (folder / WORK).is_dir():
        return DataError("this build is not finished", folder, "run the same `shardforge data build` again; it goes on")
    what = "no corpus is here" if folder.is_dir() else "the folder does not exist"
    return DataError(what, folder, f"shardforge data build --input FILES_OR_FOLDER --output {folder}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all, also after a power cut."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def unigram(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float | None]:
    """(entropy of train, cross entropy of held-out under smoothed train), nats per token, from token counts."""
    seen, asked = train.astype(np.float64), held_out.astype(np.float64)
    share = seen[seen > 0] / seen.sum()
    entropy = float(-(share * np.log(share)).sum())
    if not asked.sum():
        return entropy, None
    smoothed = np.log((seen + 1) / (seen.sum() + seen.size))
    return entropy, float(-(asked * smoothed).sum() / asked.sum())
