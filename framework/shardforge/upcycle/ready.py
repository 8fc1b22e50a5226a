"""The recipe beside the weights: `shardforge train OUTPUT/recipe.yaml` once a corpus is named.

The hyperparameters are those of the released Drop-Upcycling scripts (arXiv:2502.19261), for every model the same: a
starting point, not a claim about this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardforge.recipe.provenance import inline
from shardforge.upcycle.options import Options
from shardforge.upcycle.target import Target

WIDE = 100
SEQ_LEN = 4096
RUN = "-train"
"""Behind the name of the output: runs/NAME may be the output itself, which is no place for a run."""
HEAD = """\
# A mixture of experts that `shardforge upcycle` made of a dense model: upcycle.yaml has the options, report.html what
# they did. Optimizer, schedule and sizes are the published ones of Drop-Upcycling (arXiv:2502.19261, released scripts);
# take them as a start. The two smallest runs there had 512 sequences and 238419 steps, the others what stands here.
"""


def recipe(output: Path, target: Target, options: Options, data: Sequence[str] = ()) -> str:
    """YAML of a whole recipe. Without `data` its corpus is named CORPUS, to be replaced."""
    named = [{"path": path} for path in data or ("CORPUS",)]
    remark = "" if data else "  # folder written by `shardforge data build`: put its path here"
    lines = [
        f"name: {inline(output.resolve().name + RUN)}",
        f"seed: {options.seed}",
        *_lines({"model": target.model}, ""),
        f"data: {{sources: {inline(named)}}}{remark}",
        "optim: {kind: adamw, beta1: 0.9, beta2: 0.95, eps: 1.0e-08, weight_decay: 0.1, clip: 1.0}",
        "schedule: {kind: cosine, lr: 2.0e-04, warmup: 2000, floor: 0.1}  # to 2e-5",
        "precision: {master: fp32, compute: bf16, reduce: fp32}",
        "train:",
        f"  start: {inline(str(output))}",
        *(["  start_moments: carried"] if options.moments == "carry" else []),
        "  steps: 119210  # of 1024 * 4096 tokens: 500 billion",
        "  sequences: 1024",
        f"  seq_len: {_length(target.model)}",
        "  micro_batch: 1",
    ]
    return HEAD + "\n".join(lines) + "\n"


def _length(model: Mapping[str, Any]) -> int:
    """The published length, or what a table of positions has room for."""
    embedding = model.get("embedding")
    limit = embedding.get("length") if isinstance(embedding, dict) else None
    return min(SEQ_LEN, limit or SEQ_LEN)


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
