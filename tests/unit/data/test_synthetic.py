from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np

from shardforge.data.corpus import Corpus
from shardforge.data.synthetic import markov, sparse


def stream(folder: Path) -> np.ndarray:
    found = Corpus.open(folder).stream("train")
    out = np.empty(found.tokens, np.int64)
    found.read(0, out)
    return out


def test_a_token_is_followed_by_one_of_four(tmp_path: Path):
    markov(tmp_path, vocab=32)
    following = defaultdict(set)
    tokens = stream(tmp_path).tolist()
    for token, after in pairwise(tokens):
        if token and after:
            following[token].add(after)
    assert max(map(len, following.values())) <= 4


def test_unigrams_do_not_give_the_table_away(tmp_path: Path):
    assert markov(tmp_path).entropy_nats > 2 * np.log(4)


def test_the_same_seed_gives_the_same_corpus(tmp_path: Path):
    markov(tmp_path / "a", seed=1), markov(tmp_path / "b", seed=1), markov(tmp_path / "c", seed=2)
    a, b, c = (Corpus.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_a_sparse_corpus_is_large_and_takes_no_space(tmp_path: Path):
    made = sparse(tmp_path, tokens=10**9 + 7, shard_tokens=10**8)
    found = Corpus.open(tmp_path).stream("train")
    assert made.tokens("train") == found.tokens == 10**9 + 7
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 2_000_000
    assert found.cuts(10**9 - 50_000, 10**9 + 7).tolist() == [10**9 - 50_000, 10**9]
