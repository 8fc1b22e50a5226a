"""The tokenizer inside a GGUF file as the tokenizer.json that it was made of, where it is byte-level BPE.

Reference: llama.cpp, src/llama-vocab.cpp, for what the names of pre-tokenizers stand for.
Limits: of the ways in which text is cut before BPE, those below; SentencePiece vocabularies are not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardforge.families.gguf_file import GgufFile
from shardforge.families.source import Extract

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
SPECIAL, OWN = 3, 4  # types of tokens: no text; added by the user
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True)
class Cut:
    """How text is prepared for BPE."""

    expression: str = ""  # of its pieces; GPT-2's own where there is none
    digits: bool = False  # each alone
    composed: bool = False  # Unicode's form C first
    known_whole: bool = False  # a piece that is a token is that token, whatever the merges say


CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(digits=True),
    "qwen2": Cut(QWEN2, composed=True),
    "llama-bpe": Cut(LLAMA3, known_whole=True),
}
"""By the name of the pre-tokenizer in the file."""


def tokenizer(file: GgufFile) -> tuple[tuple[Extract, ...], str]:
    """The files, which are made when they are read, and why there are none, or ""."""
    said = file.said
    kind, cut = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre")
    if kind is None:
        return (), ""
    if kind != "gpt2" or cut not in CUTS or "tokenizer.ggml.merges" not in said:
        return (), f"the tokenizer in the file ({kind}, {cut}) is not byte-level BPE of a kind that is known"
    made = {FILE: tokenizer_json, SETTINGS: settings_json}
    return tuple(Extract(name, partial(_again, make, file.path)) for name, make in made.items()), ""


def _again(make: Callable[[Mapping[str, Any]], bytes], path: Path) -> bytes:
    """Reads the header once more: what waits for it stays small."""
    return make(GgufFile(path).said)


def tokenizer_json(said: Mapping[str, Any]) -> bytes:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens, merges = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.merges"]
    how = CUTS[said["tokenizer.ggml.pre"]]
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    numbers = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(numbers, pairs, ignore_merges=how.known_whole))
    if how.composed:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _cutter(how)
    made.decoder = decoders.ByteLevel()
    kinds = said.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for kind, add in ((SPECIAL, made.add_special_tokens), (OWN, made.add_tokens)):
        of_kind = [token for token, each in zip(tokens, kinds, strict=True) if each == kind]
        add([AddedToken(token, special=kind == SPECIAL, normalized=False) for token in of_kind])
    first = said.get("tokenizer.ggml.bos_token_id")
    if said.get("tokenizer.ggml.add_bos_token") and first is not None:
        made.post_processor = _beginning(tokens[first], first)
    return (made.to_str(pretty=True) + "\n").encode()


def _cutter(how: Cut) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if how.digits else []
    if how.expression:
        steps.append(pre_tokenizers.Split(Regex(how.expression), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not how.expression))
    return pre_tokenizers.Sequence(steps)


def _beginning(token: str, number: int) -> Any:
    """Puts a token before every text."""
    from tokenizers import processors

    return processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, number)]
    )


def settings_json(said: Mapping[str, Any]) -> bytes:
    """What stands in tokenizer_config.json."""
    tokens = said["tokenizer.ggml.tokens"]
    roles = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    ids = {name: said.get(f"tokenizer.ggml.{role}_token_id") for role, name in roles.items()}
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    found |= {name: tokens[number] for name, number in ids.items() if number is not None and number < len(tokens)}
    if template := said.get("tokenizer.chat_template"):
        found["chat_template"] = template
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()
