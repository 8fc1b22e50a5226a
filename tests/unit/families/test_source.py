from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.families.source import belonging, linked_away


def names(folder: Path) -> list[str]:
    return [file.name for file in belonging(folder)]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model.v3", "tiktoken.model", "qwen.tiktoken", "tekken.json", "merges.txt"]
)
def test_the_files_of_every_kind_of_tokenizer_belong(tmp_path, name):
    (tmp_path / name).write_text("x")
    (tmp_path / "model.py").write_text("x")
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", ["tokenizer.py", "tokenization_kimi.py"])
def test_code_does_not_belong(tmp_path, name):
    (tmp_path / name).write_text("x")
    assert names(tmp_path) == []


def test_a_link_out_of_the_folder_does_not_belong_and_is_told(tmp_path):
    (tmp_path / "secret").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert names(tmp_path / "model") == []
    assert linked_away(tmp_path / "model") == (
        "tokenizer.json: it is a link out of its folder, put the file itself there",
    )


def test_the_links_of_a_cache_belong(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abcd").write_text("x")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/abcd"))
    assert names(snapshot) == ["tokenizer.json"] and linked_away(snapshot) == ()
