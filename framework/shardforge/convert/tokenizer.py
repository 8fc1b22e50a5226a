"""Tokenizer files on their way beside the weights: taken along as they are, when they fit the table of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardforge.checkpoint import tensorfile
from shardforge.convert.format import Options
from shardforge.core.errors import CheckpointError
from shardforge.families.source import Extract, Source, astray, belonging
from shardforge.families.tensorfolder import read_json

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
NONE = Path("none")
"""In place of a folder: no tokenizer goes along."""
Files = tuple[Path | Extract, ...]


def chosen(source: Source, options: Options) -> Files:
    """The files that go along: the source's, those of a folder, or with NONE none. CheckpointError for a folder without
    any or with links out of it, and for a tokenizer of another model."""
    found: Files = source.beside.tokenizer
    if options.tokenizer is not None:
        found = () if options.tokenizer == NONE else _of(options.tokenizer)
    for path in found:
        if path.name == TOKENIZER:
            _fits(path, int(source.model["vocab"]))
    return found


def left(source: Source, options: Options) -> list[str]:
    """What is to be said of the files that `chosen` gives, a line each."""
    files, vocab = chosen(source, options), int(source.model["vocab"])
    lines = [
        f"token {last} of {path.name}, which was added to it and has no row in the model's table of vocab={vocab}: it "
        "goes along, and a text with it cannot be computed"
        for path in files
        if path.name == TOKENIZER and (last := max(_numbers(path)[1], default=0)) >= vocab
    ]
    if source.beside.tokenizer and not any(_of_tokenizer(path) for path in files):
        lines.append(f"the tokenizer: --tokenizer {options.tokenizer}")
    return lines


def _of_tokenizer(path: Path | Extract) -> bool:
    return path.name != GENERATION


def _of(folder: Path) -> Files:
    where = f"--tokenizer {folder}"
    if away := astray(folder):
        told = ", ".join(file.name for file in away)
        raise CheckpointError(f"{told} is a link out of its folder", where, "put the files themselves there")
    if found := belonging(folder):
        return found
    raise CheckpointError("there are no tokenizer files", where, f"name a folder with tokenizer.json, or {NONE}")


def copy(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        tensorfile.write_whole(folder / path.name, path.read_bytes())


def _fits(file: Path | Extract, vocab: int) -> None:
    """CheckpointError when a tokenizer makes a token of text that the model has no row for."""
    last = max(_numbers(file)[0], default=0)
    if last >= vocab:
        raise CheckpointError(
            f"token {last} of this tokenizer has no row in the model's table of vocab={vocab}",
            file if isinstance(file, Path) else file.name,
            f"name the folder of the model's own tokenizer with --tokenizer, or go without one: --tokenizer {NONE}",
        )


def _numbers(file: Path | Extract) -> tuple[list[int], list[int]]:
    """Of the tokens of the vocabulary, which is a table or a list in their order, and of those that were added to it,
    as the special ones are, which may stand in both."""
    document: dict[str, Any] = read_json(file) if isinstance(file, Path) else json.loads(file.read_bytes())
    added = [int(token.get("id", 0)) for token in document.get("added_tokens") or ()]
    vocabulary = (document.get("model") or {}).get("vocab") or {}
    numbers = range(len(vocabulary)) if isinstance(vocabulary, list) else map(int, vocabulary.values())
    return sorted(set(numbers) - set(added)), added
