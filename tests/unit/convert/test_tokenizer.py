from __future__ import annotations

import json
from pathlib import Path

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
    ],
    ids=["table", "list"],
)
def test_one_with_a_token_too_many_is_refused(run, tmp_path, document):
    with pytest.raises(CheckpointError, match="token 32 of this tokenizer has no row"):
        tokenizer.chosen(open_source(run), Options(to="huggingface", tokenizer=folder(tmp_path, **document)))


@pytest.mark.parametrize("vocab", [{"a": 0}, {"a": 0, "<more>": 32}], ids=["apart", "in the table too"])
def test_one_that_was_given_a_token_too_many_goes_along_and_it_is_told(run, tmp_path, vocab):
    document = {"model": {"vocab": vocab}, "added_tokens": [{"id": 32, "content": "<more>"}]}
    options = Options(to="huggingface", tokenizer=folder(tmp_path, **document))
    source = open_source(run)
    assert [file.name for file in tokenizer.chosen(source, options)] == ["tokenizer.json"]
    (line,) = tokenizer.left(source, options)
    assert line.startswith("token 32 of tokenizer.json, which was added to it and has no row")


def test_the_files_of_a_source_can_be_left(published):
    options, source = Options(to="huggingface", tokenizer=Path("none")), open_source(published)
    assert tokenizer.chosen(source, options) == ()
    assert tokenizer.left(source, options) == ["the tokenizer: --tokenizer none"]


def test_nothing_is_said_of_files_that_go_along(published):
    assert tokenizer.left(open_source(published), Options(to="huggingface")) == []


def test_a_folder_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer files(.|\n)*or none"):
        tokenizer.chosen(open_source(run), Options(to="huggingface", tokenizer=tmp_path / "absent"))


def test_a_file_that_leads_out_of_its_folder_is_refused(run, tmp_path):
    (tmp_path / "secret").write_text("{}")
    place = tmp_path / "place"
    place.mkdir()
    (place / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is a link out of its folder"):
        tokenizer.chosen(open_source(run), Options(to="huggingface", tokenizer=place))


def test_files_are_copied_whether_they_lie_in_a_folder_or_inside_of_another_file(tmp_path):
    (tmp_path / "merges.txt").write_text("a b")
    files = tmp_path / "merges.txt", Extract("tokenizer.json", lambda: b"{}")
    tokenizer.copy(files, tmp_path / "new" / "place")
    assert (tmp_path / "new/place/merges.txt").read_text() == "a b"
    assert (tmp_path / "new/place/tokenizer.json").read_bytes() == b"{}"
