from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shardforge.data import sources
from shardforge.data.corpus import Corpus
from shardforge.data.synthetic import write_corpus
from shardforge.recipe.schema import BuildConfig, TokenizerConfig


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """corpus([5, 3, 9]) writes documents of these lengths; token n of the train split is n + 1 modulo 60000."""

    def write(lengths: list[int], *, held_out: tuple[int, ...] = (), shard: int = 40, name: str = "corpus") -> Corpus:
        documents = numbered([*lengths, *held_out])
        kept = len(lengths)
        write_corpus(
            tmp_path / name, documents[:kept], vocab=60_001, held_out=documents[kept:], shard_tokens=shard, eos=60_000
        )
        return Corpus.open(tmp_path / name)

    return write


def numbered(lengths: list[int]) -> list[np.ndarray]:
    ends = np.cumsum([0, *lengths])
    return [np.arange(first, last) % 60_000 + 1 for first, last in pairwise(ends)]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of forty small text files, cut into some ten parts."""
    monkeypatch.setattr(sources, "SMALLEST", 1200)
    return write_texts(tmp_path / "texts", 40)


def write_texts(folder: Path, count: int) -> Path:
    folder.mkdir()
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(60)]
    for number in range(count):
        content = " ".join(draw.choices(words, k=draw.randint(5, 60)))
        (folder / f"{number:03d}.txt").write_text(content + ("\u00fcber \u4e16\n" if number % 3 else "\n"))
    return folder


@pytest.fixture
def asked(texts: Path, tmp_path: Path) -> Callable[..., BuildConfig]:
    """asked(output="a", held_out=0.2): how to build the corpus of `texts`."""

    def config(output: str = "out", **changes: object) -> BuildConfig:
        values = {"inputs": (str(texts),), "tokenizer": TokenizerConfig(vocab=300), "held_out": 0.1} | changes
        return BuildConfig(output=str(tmp_path / output), **{"shard_tokens": 1024, **values})

    return config
