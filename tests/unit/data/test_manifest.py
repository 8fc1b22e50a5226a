from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shardforge.core.errors import DataError
from shardforge.data import manifest
from shardforge.data.corpus import Corpus
from shardforge.data.manifest import FILE, Manifest, ShardRecord, fingerprint, unigram


@pytest.fixture
def made(corpus: Callable[..., Corpus]) -> Manifest:
    return corpus([5, 30, 40, 8], held_out=(7,)).manifest


def test_what_is_written_is_read(tmp_path: Path, made: Manifest):
    manifest.write(tmp_path, made)
    assert manifest.read(tmp_path) == replace(made, totals=manifest.read(tmp_path).totals)


def test_totals_count_every_split(tmp_path: Path, made: Manifest):
    assert json.loads((tmp_path / "corpus" / FILE).read_text())["totals"] == {
        "train": {"shards": 2, "tokens": 83, "documents": 4},
        "held_out": {"shards": 1, "tokens": 7, "documents": 1},
    }


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("field", ["bin_sha256", "idx_sha256"])
def test_the_fingerprint_follows_every_hash(made: Manifest, split: str, field: str):
    records: tuple[ShardRecord, ...] = (*made.splits[split][:-1], replace(made.splits[split][-1], **{field: "0" * 64}))
    assert fingerprint(replace(made, splits={**made.splits, split: records})) != fingerprint(made)


def test_the_fingerprint_follows_the_tokenizer(made: Manifest):
    assert fingerprint(replace(made, tokenizer=replace(made.tokenizer, sha256="0" * 64))) != fingerprint(made)


def test_the_fingerprint_is_16_hex_digits_of_content_alone(made: Manifest):
    assert len(fingerprint(made)) == 16 and int(fingerprint(made), 16) >= 0
    assert fingerprint(replace(made, inputs=("elsewhere",), digest="x")) == fingerprint(made)


def test_a_folder_that_does_not_exist_says_how_to_build(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist") as error:
        manifest.read(tmp_path / "none")
    assert f"shardforge data build --input FILES_OR_FOLDER --output {tmp_path / 'none'}" == error.value.fix


def test_an_unfinished_build_says_to_go_on(tmp_path: Path):
    (tmp_path / manifest.WORK).mkdir()
    with pytest.raises(DataError, match="not finished"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "tokenizer": 3}'])
def test_a_manifest_that_is_not_one_is_named(tmp_path: Path, content: str):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError, match=FILE):
        manifest.read(tmp_path)


def test_entropy_of_four_equal_tokens_is_log_four():
    assert unigram(np.array([5, 5, 5, 5, 0]), np.zeros(5)) == (pytest.approx(math.log(4)), None)


def test_unigram_is_the_cross_entropy_under_counts_plus_one():
    _, cross = unigram(np.array([3, 1, 0]), np.array([1, 0, 2]))
    assert cross == pytest.approx(-(math.log(4 / 7) + 2 * math.log(1 / 7)) / 3)
