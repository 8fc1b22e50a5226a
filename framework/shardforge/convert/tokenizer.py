"""Tokenizer files on their way beside the weights: taken along as they are, when they fit the table of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shardforge.checkpoint import tensorfile
from shardforge.convert.format import Options
from shardforge.core.errors import CheckpointError
from shardforge.families.source import Extract, Source, belonging
from shardforge.families.tensorfolder import read_json

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
Files = tuple[Path | Extract, ...]


def chosen(source: Source, options: Options) -> Files:
    """The files that go along. CheckpointError for a folder without any, and for a tokenizer of another model."""
    found: Files = source.beside.tokenizer
    if options.tokenizer is not None:
        found = belonging(options.tokenizer) if options.tokenizer.is_dir() else ()
        if not found:
            raise CheckpointError(
                "there are no tokenizer files", f"--tokenizer {options.tokenizer}", "name a folder with tokenizer.json"
            )
    for path in found:
        if path.name == TOKENIZER:
            _fits(path, int(source.model["vocab"]))
    return found


def copy(files: Files, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        tensorfile.write_whole(folder / path.name, path.read_bytes())


def _fits(file: Path | Extract, vocab: int) -> None:
    """CheckpointError when a tokenizer has a token that the model has no row for."""
    last = max(_ids(read_json(file) if isinstance(file, Path) else json.loads(file.read_bytes())), default=0)
    if last >= vocab:
        raise CheckpointError(
            f"token {last} of this tokenizer has no row in the model's table of vocab={vocab}",
            file if isinstance(file, Path) else file.name,
            "name the model's own tokenizer with --tokenizer, or a folder without one",
        )


def _ids(document: dict[str, Any]) -> list[int]:
    """Numbers of all tokens: of a table, or of a list in their order, and those that were added."""
    vocabulary = (document.get("model") or {}).get("vocab") or {}
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added = [token.get("id", 0) for token in document.get("added_tokens") or ()]
    return [int(each) for each in (*numbers, *added)]
