from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from shardforge.data import tokenize as module
from shardforge.data.sources import plan
from shardforge.data.tokenize import cut, encode, paths, tokenize, tokens
from shardforge.data.tokenizer import train

TEXTS = ["one two\nthree\n", "x", "a longer text\n" * 9 + "end without newline" * 3]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS, 270)


def test_every_text_gets_its_tokens_and_an_end(tokenizer: Tokenizer):
    expected = [[*tokenizer.encode(text).ids, 7] for text in TEXTS]
    assert [ids.tolist() for ids in encode(tokenizer, iter(TEXTS), 7)] == expected


@pytest.mark.parametrize("batch", [1, 5, 20])
def test_a_long_text_in_pieces_keeps_its_place_and_its_content(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, batch: int
):
    monkeypatch.setattr(module, "BATCH", batch)
    made = [ids.tolist() for ids in encode(tokenizer, iter(TEXTS), 0)]
    assert [tokenizer.decode(ids[:-1]) for ids in made] == TEXTS


def test_long_texts_are_cut_after_a_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 10)
    assert list(cut("abc\ndef\nghijklmnopqrstuvw\nx")) == ["abc\ndef\n", "ghijklmnop", "qrstuvw\nx"]


def test_a_part_remembers_everything_about_its_documents(tmp_path: Path, tokenizer: Tokenizer):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, content in (("a.txt", "für".encode()), ("b.txt", b""), ("c.txt", b"\xff"), ("d.txt", b"dd d")):
        (texts / name).write_bytes(content)
    (part,) = plan([str(texts)]).parts
    tokenize(part, 0, tmp_path, tokenizer, 0, "uint16")
    made = tokens(tmp_path, 0)
    assert made.names == [b"texts/a.txt", b"texts/d.txt"]
    assert made.sizes.tolist() == [4, 4]
    assert made.invalid == [("texts/c.txt", "byte 0 (0xff) is not UTF-8")] and made.empty == 1
    content = np.fromfile(made.content, np.uint16)
    ends = np.cumsum(made.lengths)
    assert tokenizer.decode(content[: ends[0] - 1].tolist()) == "für" and content.size == ends[-1]


def test_a_finished_part_is_not_made_again(texts: Path, tmp_path: Path, tokenizer: Tokenizer):
    part = plan([str(texts)]).parts[0]
    tokenize(part, 3, tmp_path, tokenizer, 0, "uint16")
    before = [path.stat().st_mtime_ns for path in paths(tmp_path, 3)]
    tokenize(part, 3, tmp_path, tokenizer, 0, "uint16")
    assert [path.stat().st_mtime_ns for path in paths(tmp_path, 3)] == before
