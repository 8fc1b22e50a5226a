"""The recipe beside the weights: `shardforge train OUTPUT/recipe.yaml` once a corpus is named.

The hyperparameters are those of the released Drop-Upcycling scripts (arXiv:2502.19261), for every model the same: a
starting point, not a claim about this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shardforge.families import ready
from shardforge.recipe.provenance import inline
from shardforge.upcycle.options import Options
from shardforge.upcycle.target import Target

HEAD = """\
# A mixture of experts that `shardforge upcycle` made of a dense model: upcycle.yaml has the options, report.html what
# they did. Optimizer, schedule and sizes are the published ones of Drop-Upcycling (arXiv:2502.19261, released scripts);
# take them as a start. The two smallest runs there had 512 sequences and 238419 steps, the others what stands here.
"""


def recipe(output: Path, target: Target, options: Options, data: Sequence[str] = ()) -> str:
    """YAML of a whole recipe. Without `data` its corpus is named CORPUS, to be replaced."""
    rest = [
        "optim: {kind: adamw, beta1: 0.9, beta2: 0.95, eps: 1.0e-08, weight_decay: 0.1, clip: 1.0}",
        "schedule: {kind: cosine, lr: 2.0e-04, warmup: 2000, floor: 0.1}  # to 2e-5",
        "precision: {master: fp32, compute: bf16, reduce: fp32}",
        "train:",
        f"  start: {inline(str(output))}",
        *(["  start_moments: carried"] if options.moments == "carry" else []),
        "  steps: 119210  # of 1024 * 4096 tokens: 500 billion",
        "  sequences: 1024",
        f"  seq_len: {ready.length(target.model)}",
        "  micro_batch: 1",
    ]
    return ready.recipe(output, target.model, rest, head=HEAD, seed=options.seed, data=data)
