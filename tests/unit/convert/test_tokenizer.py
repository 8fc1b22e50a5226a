from __future__ import annotations

import json

import pytest

from shardforge.convert import tokenizer
from shardforge.convert.format import Options
from shardforge.core.errors import CheckpointError
from shardforge.families.open import open_source
from shardforge.families.source import Extract


def folder(tmp_path, **document):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "weights.bin").write_text("not of a tokenizer")
    return tmp_path


@pytest.mark.parametrize(
    "document",
    [
        {"model": {"vocab": {"a": 0, "b": 31}}},
        {"model": {"vocab": [["a", -1.0]] * 32}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 31}]},
        {},
    ],
    ids=["table", "list", "added", "nothing"],
)
def test_a_tokenizer_that_fits_goes_along(run, tmp_path, document):
    source = open_source(run)
    found = tokenizer.chosen(source, Options(to="huggingface", tokenizer=folder(tmp_path, **document)))
    assert [file.name for file in found] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "document",
    [
        {"model": {"vocab": {"a": 0, "b": 32}}},
        {"model": {"vocab": [["a", -1.0]] * 33}},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 32}]},
    ],
    ids=["table", "list", "added"],
)
def test_one_with_a_token_too_many_is_refused(run, tmp_path, document):
    with pytest.raises(CheckpointError, match="token 32 of this tokenizer has no row"):
        tokenizer.chosen(open_source(run), Options(to="huggingface", tokenizer=folder(tmp_path, **document)))


def test_files_are_copied_whether_they_lie_in_a_folder_or_inside_of_another_file(tmp_path):
    (tmp_path / "merges.txt").write_text("a b")
    files = tmp_path / "merges.txt", Extract("tokenizer.json", lambda: b"{}")
    tokenizer.copy(files, tmp_path / "new" / "place")
    assert (tmp_path / "new/place/merges.txt").read_text() == "a b"
    assert (tmp_path / "new/place/tokenizer.json").read_bytes() == b"{}"
