"""Upcycling a random dense model with all cores, beside `cp` of what it wrote. Both end when the disk has the bytes.

What is copied comes from the disk, as of any large folder: upcycling leaves little of it in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from shardforge.checkpoint import tensorfile
from shardforge.checkpoint.tensorfile import TYPES, Part
from shardforge.core.errors import ForgeError
from shardforge.core.units import bytes_

NAMES = {"fp32": "float32", "bf16": "bfloat16"}
HEAD = 128
SPARE = 1.1
"""Bytes that are asked of the disk, over those that are counted."""
Upcycle = Callable[[Path, Path], object]
"""(source, output): makes the output."""
USUAL_BYTES = 4.5e9
"""Of the experts: the start of the processes is small in the time of the work, and all files take less than 12 GB."""


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    inner: int
    experts: int
    dtype: str  # a key of NAMES

    @classmethod
    def usual(cls, hidden: int, inner: int, experts: int, dtype: str) -> Size:
        """With as many layers as make USUAL_BYTES."""
        one = cls(1, hidden, inner, experts, dtype)
        return replace(one, layers=max(2, round(USUAL_BYTES / one.bytes)))

    @property
    def bytes(self) -> int:
        """Of the experts that are written."""
        return 3 * self.layers * self.hidden * self.inner * self.experts * TYPES[NAMES[self.dtype]][0].itemsize


def run(upcycle: Upcycle, size: Size, pairs: int, folder: Path | None, tell: Callable[[str], object]) -> float:
    """Speed of upcycling over speed of copying, the median of `pairs`; `folder` is where the files go for a while."""
    with TemporaryDirectory(prefix="bench-upcycle-", dir=folder) as made:
        place = Path(made)
        needed, free = int(2 * size.bytes * SPARE), shutil.disk_usage(place).free
        if needed > free:
            what = f"the files need {bytes_(needed)} and the disk has {bytes_(free)} left"
            raise ForgeError(what, place.parent, "--folder on another disk, or fewer --layers")
        write_source(place / "source", size)
        ratios = []
        for pair in range(pairs):
            written, spent, copied = once(upcycle, place)
            ratios.append(copied / spent)
            rates = (
                f"upcycling {spent:.1f} s, {bytes_(written / spent)}/s; cp {copied:.1f} s, {bytes_(written / copied)}/s"
            )
            tell(f"{size.dtype} {pair + 1}: {bytes_(written)}: {rates}; ratio {ratios[-1]:.2f}")
    return statistics.median(ratios)


def once(upcycle: Upcycle, place: Path) -> tuple[int, float, float]:
    """Bytes of the result, seconds of upcycling, seconds of copying."""
    output, copy = place / "output", place / "copy"
    os.sync()
    begun = time.perf_counter()
    upcycle(place / "source", output)
    spent = time.perf_counter() - begun
    files = [path for path in output.rglob("*") if path.is_file()]
    os.sync()
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(output), str(copy)], check=True)
    for file in copy.rglob("*"):
        tensorfile.settle_folder(file)  # of files it does the same
    copied = time.perf_counter() - begun
    written = sum(file.stat().st_size for file in files)
    shutil.rmtree(output)
    shutil.rmtree(copy)
    return written, spent, copied


def write_source(path: Path, size: Size) -> None:
    """A Hugging Face folder of a Llama with normal weights and a small table of tokens."""
    path.mkdir()
    heads = max(1, size.hidden // HEAD)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "max_position_embeddings": 4096,
        "num_attention_heads": heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": NAMES[size.dtype],
        "vocab_size": 64,
    }
    (path / "config.json").write_text(json.dumps(config))
    tensorfile.write_tensors(path / "model.safetensors", list(_parts(size)))


def _parts(size: Size) -> Iterator[Part]:
    chance, dtype = torch.Generator().manual_seed(0), TYPES[NAMES[size.dtype]][0]

    def part(name: str, *shape: int) -> Part:
        def read() -> Tensor:
            if len(shape) == 1:
                return torch.ones(shape, dtype=dtype)
            return torch.randn(prod(shape), generator=chance).mul_(0.02).view(shape).to(dtype)

        return Part(name, NAMES[size.dtype], shape, read)

    yield part("model.embed_tokens.weight", 64, size.hidden)
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield part(f"{prefix}.{norm}.weight", size.hidden)
        for name in "qkvo":
            yield part(f"{prefix}.self_attn.{name}_proj.weight", size.hidden, size.hidden)
        for name in ("gate", "up"):
            yield part(f"{prefix}.mlp.{name}_proj.weight", size.inner, size.hidden)
        yield part(f"{prefix}.mlp.down_proj.weight", size.hidden, size.inner)
    yield part("model.norm.weight", size.hidden)
