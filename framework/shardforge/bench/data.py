"""How fast batches are made, and how long a start takes at any step of a corpus of 10^12 tokens."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

SECONDS = 4.0
SEQ_LEN = 2048
STEPS = (0, 10**9)
START = """
import sys, time
begun = time.perf_counter()
import torch
from shardforge.data.loader import Loader
from shardforge.recipe.schema import DataConfig, SourceConfig, TrainConfig
imported = time.perf_counter()
folder, step = sys.argv[1], int(sys.argv[2])
data = DataConfig(sources=(SourceConfig(path=folder),), prefetch=0)
train = TrainConfig(steps=step + 1, sequences=8, seq_len=2048, eval_sequences=0)
batch = Loader(data, train, 0, vocab=50_000).batch(step)
ready = time.perf_counter()
assert batch.tokens.shape == (8, 2048)
print(ready - imported, ready - begun)
"""


def run(out: IO[str]) -> dict[str, float]:
    """Measure and print a table; the numbers come back under the names of its rows."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        results |= throughput(Path(scratch))
        results |= start_up(Path(scratch))
    width = max(len(name) for name in results)
    for name, value in results.items():
        shown = f"{value / 1e6:12.1f} M" if name.endswith("per_core") else f"{value:12.3f} s"
        print(f"{name:{width}} {shown}", file=out)
    return results


def throughput(scratch: Path) -> dict[str, float]:
    """Tokens a second of one thread, isolated documents of the standard library, page cache warm."""
    import torch

    from shardforge.data.build import build
    from shardforge.data.loader import Loader
    from shardforge.recipe.schema import BuildConfig, DataConfig, SourceConfig, TokenizerConfig, TrainConfig

    folder = str(scratch / "stdlib")
    began = time.perf_counter()
    config = BuildConfig(inputs=("stdlib",), output=folder, tokenizer=TokenizerConfig(vocab=16_384))
    made = build(config, progress=False)
    results = {"build_stdlib": time.perf_counter() - began}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for packing in ("cut", "best_fit"):
        data = DataConfig(sources=(SourceConfig(path=folder),), packing=packing, prefetch=0)
        train = TrainConfig(steps=10**9, sequences=64, seq_len=SEQ_LEN)
        loader = Loader(data, train, 0, vocab=made.manifest.tokenizer.vocab)
        for step in range(loader.samples // 64 + 1):
            loader.batch(step)
        began, step = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            loader.batch(step)
            step += 1
        results[f"{packing}_tokens_per_core"] = step * 64 * SEQ_LEN / (time.perf_counter() - began)
    torch.set_num_threads(threads)
    return results


def start_up(scratch: Path) -> dict[str, float]:
    """Seconds from a fresh process to its first batch, without and with imports."""
    from shardforge.data.synthetic import sparse

    folder = scratch / "sparse"
    sparse(folder)
    results = {}
    for step in STEPS:
        code = [sys.executable, "-c", START, str(folder), str(step)]
        spoken = subprocess.run(code, check=True, capture_output=True, text=True).stdout.split()
        results[f"start_at_step_{step}"], results[f"start_at_step_{step}_with_imports"] = map(float, spoken)
    results["disk_gigabytes"] = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) / 1e9
    return results
