from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardforge.core.errors import DataError, Problems
from shardforge.data import corpus as module
from shardforge.data.corpus import Corpus
from shardforge.data.manifest import FILE

LENGTHS = [5, 30, 1, 40, 8, 2, 60]
Make = Callable[..., Corpus]
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
RANGES = st.tuples(st.integers(0, 145), st.integers(0, 145)).map(sorted).filter(lambda pair: pair[0] < pair[1])


@SHARED
@given(RANGES)
def test_tokens_are_read_across_shards(corpus: Make, window: list[int]):
    start, stop = window
    out = np.empty(stop - start, np.int64)
    corpus(LENGTHS).stream("train").read(start, out)
    assert out.tolist() == list(range(start + 1, stop + 1))


@SHARED
@given(RANGES)
def test_cuts_are_the_start_and_every_document_inside(corpus: Make, window: list[int]):
    start, stop = window
    starts = np.cumsum([0, *LENGTHS]).tolist()
    cuts = corpus(LENGTHS).stream("train").cuts(start, stop).tolist()
    assert cuts == [start, *(at for at in starts if start < at < stop)]


@SHARED
@given(RANGES)
def test_places_name_each_document_and_its_tokens(corpus: Make, window: list[int]):
    start, stop = window
    ends = np.cumsum([0, *LENGTHS]).tolist()
    expected = [
        (f"train/{number}", max(start, first) - first, min(stop, last) - first)
        for number, (first, last) in enumerate(pairwise(ends))
        if max(start, first) < min(stop, last)
    ]
    places = corpus(LENGTHS).stream("train").places(start, stop)
    assert [(place.name, place.start, place.stop) for place in places] == expected


def test_shards_are_closed_again_and_still_read(corpus: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "OPEN_SHARDS", 2)
    stream = corpus([10] * 20, shard=10).stream("train")
    kept = stream.reader(0).content
    assert [int(stream.reader(shard).content[0]) for shard in range(20)] == [10 * n + 1 for n in range(20)]
    assert len(stream._open) == 2 and int(kept[0]) == 1


def test_documents_without_names_are_called_by_shard_and_number(corpus: Make):
    made = corpus([4, 5])
    (made.path / "train-00000.names").unlink()
    assert Corpus.open(made.path).stream("train").name(0, 1) == "train-00000#1"


def test_an_intact_corpus_is_verified(corpus: Make):
    corpus(LENGTHS, held_out=(9,)).verify()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_changed_byte_is_found_by_verify(corpus: Make, suffix: str):
    made = corpus(LENGTHS)
    path = made.path / f"train-00001{suffix}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"train-00001{suffix}"):
        made.verify()


def test_names_that_are_fewer_than_documents_are_found_by_verify(corpus: Make):
    made = corpus([4, 5, 6])
    module.beside(made.path / "train-00000", ".names").write_bytes(b"SFNAMES\x00" + bytes(16))
    with pytest.raises(DataError, match="0 names, expected 3"):
        made.verify()


def test_all_damaged_files_are_reported_when_opened(corpus: Make):
    made = corpus(LENGTHS)
    (made.path / "train-00000.bin").write_bytes(b"12")
    (made.path / "train-00001.idx").unlink()
    with pytest.raises(Problems) as error:
        Corpus.open(made.path)
    found = [(Path(problem.where).name, problem.what) for problem in error.value.problems]
    assert found == [
        ("train-00000.bin", "truncated: 2 bytes, expected 152 by manifest.json"),
        ("train-00001.idx", "the file is missing, expected 102 bytes"),
    ]


def test_another_tokenizer_is_refused_with_both_hashes(corpus: Make):
    made = corpus([4])
    made.tokenizer.write_bytes(b"{}")
    with pytest.raises(DataError, match=made.manifest.tokenizer.sha256[:16]):
        Corpus.open(made.path)


def test_a_missing_tokenizer_is_named(corpus: Make):
    made = corpus([4])
    made.tokenizer.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Corpus.open(made.path)


def test_an_empty_corpus_is_refused(corpus: Make):
    made = corpus([4])
    raw = json.loads((made.path / FILE).read_text())
    raw["splits"]["train"] = []
    (made.path / FILE).write_text(json.dumps(raw))
    with pytest.raises(DataError, match="0 tokens"):
        Corpus.open(made.path)
