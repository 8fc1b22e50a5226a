from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardforge.core.errors import DataError
from shardforge.data import packing
from shardforge.data.corpus import Corpus, Stream
from shardforge.data.packing import Packing, best_fit, fill, pack, split_long
from shardforge.nn.batch import IGNORE, PADDING

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
BLANK = 60_000


def rows(corpus: Corpus, packed: Packing, seq_len: int, joined: bool = False) -> list[tuple[np.ndarray, ...]]:
    """(tokens, labels, positions, documents) of every sample."""
    out = []
    for index in range(packed.samples):
        row = tuple(np.empty(seq_len, np.int64) for _ in range(4))
        fill(corpus.stream("train"), packed.spans(index), joined, BLANK, row)
        out.append(row)
    return out


def naive_rules(window: list[tuple[int, int]], size: int, joined: bool) -> tuple[list[int], ...]:
    """The rules, token by token. `window`: (token, document) of at most size + 1 places."""
    tokens, labels, positions, documents = [], [], [], []
    seen: list[int] = []
    for place in range(size):
        if place >= len(window):
            tokens.append(BLANK), labels.append(IGNORE), documents.append(PADDING)
            positions.append(place - len(window))
            continue
        token, document = window[place]
        if document not in seen:
            seen.append(document)
        following = window[place + 1] if place + 1 < len(window) else None
        scored = following is not None and (joined or following[1] == document)
        tokens.append(token)
        labels.append(following[0] if scored else IGNORE)
        documents.append(0 if joined else seen.index(document))
        first = 0 if joined else next(i for i, (_, other) in enumerate(window) if other == document)
        positions.append(place - first)
    return tokens, labels, positions, documents


def owners(lengths: list[int]) -> list[tuple[int, int]]:
    """(token, document) of every token of the corpus that the fixture writes."""
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    return [(token + 1, number) for token, number in enumerate(document)]


@SHARED
@given(lengths=LENGTHS, seq_len=st.integers(2, 30), joined=st.booleans(), shard=st.integers(1, 90))
def test_cut_equals_the_rules_token_by_token(
    corpus: Callable[..., Corpus], lengths: list[int], seq_len: int, joined: bool, shard: int
):
    made = corpus(lengths, shard=shard)
    stream = owners(lengths)
    packed = pack(made, "train", seq_len, "cut")
    for index, row in enumerate(rows(made, packed, seq_len, joined)):
        expected = naive_rules(stream[index * seq_len : index * seq_len + seq_len + 1], seq_len, joined)
        assert tuple(part.tolist() for part in row) == expected


@SHARED
@given(lengths=LENGTHS, seq_len=st.integers(2, 30), shard=st.integers(1, 90))
def test_best_fit_equals_the_rules_token_by_token(
    corpus: Callable[..., Corpus], lengths: list[int], seq_len: int, shard: int
):
    made = corpus(lengths, shard=shard)
    document = dict(owners(lengths))
    packed = pack(made, "train", seq_len, "best_fit")
    for index, row in enumerate(rows(made, packed, seq_len)):
        window = [(token + 1, document[token + 1]) for a, b in packed.spans(index).tolist() for token in range(a, b)]
        assert tuple(part.tolist() for part in row) == naive_rules(window, seq_len, joined=False)


@pytest.mark.parametrize("kind", ["cut", "best_fit"])
@SHARED
@given(lengths=LENGTHS, seq_len=st.integers(2, 30))
def test_every_token_but_a_documents_first_is_predicted_exactly_once(
    corpus: Callable[..., Corpus], kind: str, lengths: list[int], seq_len: int
):
    made = corpus(lengths)
    targets = Counter(
        label for row in rows(made, pack(made, "train", seq_len, kind), seq_len) for label in row[1].tolist()
    )
    targets.pop(IGNORE, None)
    first = set((np.cumsum([0, *lengths[:-1]]) + 1).tolist())
    assert targets == Counter(set(range(1, sum(lengths) + 1)) - first)


@SHARED
@given(lengths=LENGTHS, seq_len=st.integers(2, 30))
def test_best_fit_never_splits_a_document_that_fits(corpus: Callable[..., Corpus], lengths: list[int], seq_len: int):
    made = corpus(lengths)
    packed = pack(made, "train", seq_len, "best_fit")
    pieces = Counter(tuple(span) for index in range(packed.samples) for span in packed.spans(index).tolist())
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    short = [(a, a + n) for a, n in zip(starts, lengths, strict=True) if n <= seq_len + 1]
    assert all(pieces[piece] == 1 for piece in short)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 70))
def test_bulk_best_fit_fills_bins_like_one_by_one_best_fit(lengths: list[int], capacity: int):
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, number) for number, room in enumerate(free) if room >= length]
        if not fitting:
            free.append(capacity)
            fitting = [(capacity, len(free) - 1)]
        free[min(fitting)[1]] -= length
    loads = np.bincount(best_fit(np.array(lengths), capacity), lengths)
    assert sorted(loads.tolist()) == sorted(capacity - room for room in free)


def test_neighbouring_pieces_of_a_long_document_share_one_token():
    starts, lengths = split_long(np.array([0, 100]), np.array([21, 3]), seq_len=10)
    assert starts.tolist() == [0, 10, 100] and lengths.tolist() == [11, 11, 3]


def test_groups_packed_one_at_a_time_keep_every_document(
    corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(packing, "GROUP", 4)
    lengths = [3, 9, 4, 2, 8, 7, 1, 5, 6, 3, 2]
    packed = pack(corpus(lengths, shard=12), "train", 10, "best_fit")
    pieces = sorted(tuple(span) for index in range(packed.samples) for span in packed.spans(index).tolist())
    ends = np.cumsum(lengths).tolist()
    assert pieces == list(zip([0, *ends[:-1]], ends, strict=True))


def test_the_index_of_best_fit_is_made_once(corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch):
    made = corpus([5, 6, 7])
    first = pack(made, "train", 8, "best_fit").samples

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(packing, "_write_index", refuse)
    assert pack(made, "train", 8, "best_fit").samples == first


def test_an_index_that_another_rank_finished_first_is_used(
    corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
):
    made = corpus([5, 6, 7])
    write = packing._write_index

    def slower(stream: Stream, seq_len: int, folder: Path) -> None:
        write(stream, seq_len, folder)
        monkeypatch.setattr(packing, "_write_index", write)
        pack(made, "train", seq_len, "best_fit")

    monkeypatch.setattr(packing, "_write_index", slower)
    assert pack(made, "train", 8, "best_fit").samples == 3
    assert not list((made.path / "packed").glob("*.tmp"))


def test_an_index_that_cannot_be_written_says_what_to_do(
    corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
):
    made = corpus([5])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "_write_index", full)
    with pytest.raises(DataError, match="No space left") as error:
        pack(made, "train", 8, "best_fit")
    assert "packing: cut" in error.value.fix
