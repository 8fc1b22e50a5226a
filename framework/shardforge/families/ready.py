"""A recipe to be trained from weights that lie beside it, once a corpus is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardforge.recipe.provenance import inline

WIDE = 100
SEQ_LEN = 4096
RUN = "-train"
"""Behind the name of the output: runs/NAME may be the output itself, which is no place for a run."""


def recipe(
    output: Path, model: Mapping[str, Any], rest: Sequence[str], *, head: str, seed: int = 0, data: Sequence[str] = ()
) -> str:
    """YAML of a whole recipe: a head of comments, the model, a corpus, and the lines of `rest`. Without `data` the
    corpus is named CORPUS, to be replaced."""
    named = [{"path": path} for path in data or ("CORPUS",)]
    remark = "" if data else "  # folder written by `shardforge data build`: put its path here"
    lines = [
        f"name: {inline(output.resolve().name + RUN)}",
        f"seed: {seed}",
        *_lines({"model": model}, ""),
        f"data: {{sources: {inline(named)}}}{remark}",
        *rest,
    ]
    return head + "\n".join(lines) + "\n"


def length(model: Mapping[str, Any], most: int = SEQ_LEN) -> int:
    """Tokens of a sequence: `most`, or what a table of positions has room for."""
    embedding = model.get("embedding")
    limit = embedding.get("length") if isinstance(embedding, dict) else None
    return min(most, limit or most)


def _lines(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    """Block YAML; what is short and has no sections of its own stands on one line."""
    for key, child in value.items():
        flat = f"{indent}{inline(key)}: {inline(child)}"
        if isinstance(child, Mapping) and child and (len(flat) > WIDE or _deep(child)):
            yield f"{indent}{inline(key)}:"
            yield from _lines(child, indent + "  ")
        else:
            yield flat


def _deep(value: Mapping[str, Any]) -> bool:
    return any(isinstance(child, Mapping) and len(child) > 1 for child in value.values())
