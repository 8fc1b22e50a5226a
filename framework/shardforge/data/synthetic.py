"""Corpora without text: a small one that a model can learn, and a huge one that takes no space."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shardforge.data import manifest
from shardforge.data.manifest import Manifest, ShardRecord, TokenizerRecord
from shardforge.data.shards import CODES, ShardWriter, beside, index_parts, token_type, write_names

TOKENIZER = b'{"model": "none; these tokens were drawn, not read"}'


def write_corpus(
    folder: Path,
    documents: Sequence[np.ndarray],
    *,
    vocab: int,
    held_out: Sequence[np.ndarray] = (),
    shard_tokens: int = 100_000_000,
    eos: int = 0,
) -> Manifest:
    """A corpus of given token arrays, each of which should end in `eos`."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_type(vocab)
    splits: dict[str, tuple[ShardRecord, ...]] = {}
    counts = {}
    for split, chosen in (("train", documents), ("held_out", held_out)):
        records: list[ShardRecord] = []
        for first, last in _shards([document.size for document in chosen], shard_tokens):
            name = f"{split}-{len(records):05d}"
            with ShardWriter(folder / name, dtype) as writer:
                for document in chosen[first:last]:
                    writer.add(document)
                written = writer.close()
            write_names(folder / f"{name}.names", [f"{split}/{number}".encode() for number in range(first, last)])
            records.append(ShardRecord(name=name, **vars(written)))
        splits[split] = tuple(records)
        counts[split] = np.bincount(np.concatenate([np.empty(0, np.int64), *chosen]).astype(np.int64), minlength=vocab)
    entropy, unigram = manifest.unigram(counts["train"], counts["held_out"])
    return _commit(folder, splits, vocab, eos, entropy, unigram)


def markov(folder: Path, *, vocab: int = 64, documents: int = 200, tokens: int = 100, seed: int = 0) -> Manifest:
    """Documents of 1.5 * `tokens` at most, in which each token is followed by one of four others; a tenth is held out.

    A model that learns the table reaches log(4) = 1.39 nats; unigram statistics stay near log(vocab).
    """
    draw = np.random.default_rng(seed)
    follow = draw.integers(1, vocab, (vocab, 4))
    made = []
    for size in draw.integers(max(2, tokens // 2), tokens * 3 // 2 + 1, documents):
        out = np.zeros(size, np.int64)
        choices = draw.integers(0, 4, size)
        for place in range(size - 1):
            out[place] = follow[out[place - 1] if place else draw.integers(1, vocab), choices[place]]
        made.append(out)
    kept = max(1, documents // 10)
    return write_corpus(folder, made[kept:], vocab=vocab, held_out=made[:kept])


def sparse(folder: Path, tokens: int = 10**12, shard_tokens: int = 10**8, document_tokens: int = 10**5) -> Manifest:
    """A corpus of `tokens` zeros in sparse files with real indices; 10^12 tokens take about 240 MB of disk.

    Its hashes are of the shards' names, so `Corpus.verify` refuses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_type(50_000)
    records = []
    for number in range(-(-tokens // shard_tokens)):
        name = f"train-{number:05d}"
        size = min(shard_tokens, tokens - number * shard_tokens)
        lengths = np.full(-(-size // document_tokens), document_tokens, np.int32)
        lengths[-1] = size - document_tokens * (lengths.size - 1)
        with beside(folder / name, ".bin").open("wb") as file:
            file.truncate(size * dtype.itemsize)
        beside(folder / name, ".idx").write_bytes(b"".join(index_parts(lengths, dtype, CODES[dtype])))
        fake = hashlib.sha256(name.encode()).hexdigest()
        records.append(ShardRecord(name=name, tokens=size, documents=lengths.size, bin_sha256=fake, idx_sha256=fake))
    return _commit(folder, {"train": tuple(records), "held_out": ()}, 50_000, 0, 0.0, None)


def _commit(
    folder: Path,
    splits: dict[str, tuple[ShardRecord, ...]],
    vocab: int,
    eos: int,
    entropy: float,
    unigram: float | None,
) -> Manifest:
    path = folder / "tokenizer.json"
    path.write_bytes(TOKENIZER)
    made = Manifest(
        tokenizer=TokenizerRecord(file=path.name, sha256=manifest.sha256(path), vocab=vocab, eos=eos),
        dtype=token_type(vocab).name,
        splits=splits,
        text_bytes=dict.fromkeys(splits, 0),
        entropy_nats=entropy,
        unigram_nats=unigram,
    )
    manifest.write(folder, made)
    return made


def _shards(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """(first, last + 1) document of each shard; a shard ends with the document that brings it to `limit`."""
    out, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        held += size
        if held >= limit or number == len(sizes) - 1:
            out.append((first, number + 1))
            first, held = number + 1, 0
    return out
