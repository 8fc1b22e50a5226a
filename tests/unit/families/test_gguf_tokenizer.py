"""Tokenizers inside of GGUF files. The real one of SmolLM2 is read in tests/parity/test_smollm2.py."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shardforge.families.gguf_tokenizer import settings_json, tokenizer_json

TOKENS = ["<s>", "</s>", "<x>", *"abc12", "ab", "Ġ", "Ġa"]
SAID: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.merges": ["a b", "Ġ a"],
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}


def said(**changes: Any) -> dict[str, Any]:
    return SAID | {"tokenizer.ggml.pre": "smollm"} | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def read_tokenizer(**changes: Any) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json(said(**changes)).decode())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["ab", "1", "2", "Ġa"]),
        ("gpt-2", ["ab", "12", "Ġa"]),
        ("qwen2", ["ab", "1", "2", "Ġa"]),
        ("llama-bpe", ["ab", "12", "Ġa"]),
    ],
)
def test_text_is_cut_as_the_file_says(pre, pieces):
    read = read_tokenizer(pre=pre)
    assert [piece for piece, _ in read.pre_tokenizer.pre_tokenize_str("ab12 a")] == pieces


def test_special_tokens_are_no_text_and_others_that_were_added_are():
    read = read_tokenizer()
    ids = read.encode("<s>ab<x>").ids
    assert (ids, read.decode(ids)) == ([0, 8, 2], "ab<x>")


def test_a_token_before_every_text_is_put_there_where_the_file_says_so():
    assert read_tokenizer(add_bos_token=True).encode("ab").ids == [0, 8]


def test_roles_of_tokens_are_beside_the_tokenizer():
    found = json.loads(settings_json(SAID | {"tokenizer.chat_template": "{{ x }}"}))
    assert (found["bos_token"], found["eos_token"], found["chat_template"]) == ("<s>", "</s>", "{{ x }}")
