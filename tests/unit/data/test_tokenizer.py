from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.core.errors import DataError
from shardforge.data.documents import read
from shardforge.data.sources import plan
from shardforge.data.tokenizer import EOS, eos, load, name_hash, sample, threshold, train

TEXTS = ["def add(a, b):\n    return a + b\n", "für 世界 \U0001f600\n\n\tx", "aaaa bbbb aaaa " * 9]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    train(TEXTS, 300).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_any_text_comes_back_from_its_tokens(saved: Path):
    tokenizer = load(saved)
    assert [tokenizer.decode(tokenizer.encode(text).ids) for text in TEXTS] == TEXTS


def test_the_same_texts_train_the_same_tokenizer():
    assert train(TEXTS, 290).to_str() == train(iter(TEXTS), 290).to_str()


def test_the_name_of_a_special_token_in_the_text_stays_text(saved: Path):
    tokenizer = load(saved)
    ids = tokenizer.encode(f"a{EOS}b").ids
    assert eos(tokenizer, saved) not in ids and tokenizer.decode(ids) == f"a{EOS}b"


def test_padding_and_truncation_of_a_loaded_tokenizer_are_off(tmp_path: Path):
    tokenizer = train(TEXTS, 300)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    text = TEXTS[0]
    assert load(tmp_path / "t.json").encode(text).ids == train(TEXTS, 300).encode(text).ids


def test_the_end_of_a_document_is_what_the_config_beside_says(saved: Path):
    tokenizer = load(saved)
    saved.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert eos(tokenizer, saved) == tokenizer.token_to_id("a")


def test_a_tokenizer_without_an_end_of_document_is_refused(saved: Path):
    saved.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": "<nothing>"}))
    with pytest.raises(DataError, match="<nothing>") as error:
        eos(load(saved), saved)
    assert EOS in error.value.fix


@pytest.mark.parametrize("content", [None, b"{}", b"\xff not json"])
def test_what_is_not_a_tokenizer_is_named(tmp_path: Path, content: bytes | None):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"t\.json"):
        load(path)


def test_a_sample_leaves_held_out_documents_out(texts: Path):
    parts = plan([str(texts)]).parts
    limit = threshold(0.5)
    kept = {d.text for part in parts for d in read(part) if name_hash(d.name) >= limit}
    assert set(sample(parts, 10**9, limit)) == kept and 0 < len(kept) < 40


def test_a_sample_stops_at_its_budget(texts: Path):
    taken = list(sample(plan([str(texts)]).parts, 500, 0))
    assert sum(len(text.encode()) for text in taken[:-1]) < 500 <= sum(len(text.encode()) for text in taken)


def test_names_hash_evenly():
    low = sum(name_hash(f"folder/{number}.py") < threshold(0.25) for number in range(4000))
    assert abs(low - 1000) < 140
