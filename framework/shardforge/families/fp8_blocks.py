"""Weights that DeepSeek released in FP8: numbers of 8 bits, and a factor for each block of rows and columns.

Paper: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437, section 3.3.2; README_WEIGHTS of the released
    weights: `weight` is E4M3 [out, in], `weight_scale_inv` float32 [out / 128, in / 128], rounded up, and a weight is
    the product of the two.
Limits: products are computed in float32 and rounded to the type that config.json calls the model's (bfloat16 where it
    has no say), as the released conversion does it. How activations are quantised says nothing about weights.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from shardforge.checkpoint.tensorfile import TYPES
from shardforge.families.linked import Tensors
from shardforge.families.settings import Settings
from shardforge.families.source import Info

FP8, FACTORS = "float8_e4m3fn", "_scale_inv"
BLOCK = (128, 128)
ABOUT_ACTIVATIONS = {"activation_scheme", "scale_fmt", "modules_to_not_convert", "dequantize"}
WIDE = ("float32", "bfloat16", "float16")
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""What each byte stands for."""


def decoded(tensors: Tensors, settings: Settings) -> Tensors:
    """The tensors as they are without `quantization_config`, else with weights in place of blocks. What is not said as
    DeepSeek says it, and every weight without its factors, is noted in the settings."""
    told = settings.get("quantization_config")
    if told is None:
        return tensors
    block = _block(told, settings)
    wide = str(settings.get("torch_dtype", settings.get("dtype", "bfloat16")))
    if wide not in WIDE:
        settings.wrong(f"torch_dtype={wide!r} is not supported for FP8 blocks, only {', '.join(WIDE)}")
        return tensors
    found = Blocks(tensors, block, wide)
    for what in found.lacking():
        settings.wrong(what)
    return found


def _block(told: Any, settings: Settings) -> tuple[int, int]:
    """Rows and columns of a block."""
    where = "quantization_config"
    if not isinstance(told, dict):
        settings.wrong(f"{where} is {told!r}, not a mapping")
        return BLOCK
    rest = Settings(told, settings.path)
    rest.only("quant_method", "fp8")
    rest.only("fmt", "e4m3")
    sizes = rest.get("weight_block_size")
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        rest.wrong(f"weight_block_size is {sizes!r}, not the rows and columns of a block")
        sizes = BLOCK
    for key in sorted(told.keys() - ABOUT_ACTIVATIONS - {"quant_method", "fmt", "weight_block_size"}):
        rest.wrong(f"{key}={told[key]!r} is not supported")
    for problem in rest.problems:
        settings.wrong(f"{where}: {problem.what}")
    return sizes[0], sizes[1]


class Blocks:
    """See `families.linked.Tensors`. Weights in blocks of FP8 come in the type `wide`, all others as they are."""

    def __init__(self, tensors: Tensors, block: tuple[int, int], wide: str):
        self.path, self._tensors, self.block, self.wide = tensors.path, tensors, block, wide
        self._blocked = {name for name, info in tensors.names.items() if info.dtype == FP8}
        factors = {name + FACTORS for name in self._blocked}
        self.names: dict[str, Info] = {
            name: Info(info.shape, wide) if name in self._blocked else info
            for name, info in tensors.names.items()
            if name not in factors
        }

    def lacking(self) -> list[str]:
        """Weights that cannot be read, a line each: their factors are not there, or not one for each block."""
        return list(chain.from_iterable(self._lacking(name) for name in sorted(self._blocked)))

    def _lacking(self, name: str) -> list[str]:
        shape, factors = self._tensors.names[name].shape, self._tensors.names.get(name + FACTORS)
        if factors is None:
            return [f"{name} is {FP8}, and there is no {name + FACTORS}"]
        if len(shape) != 2:
            return [f"{name} {list(shape)} is {FP8}, and no matrix"]
        wanted = tuple(-(-size // side) for size, side in zip(shape, self.block, strict=True))
        if factors.shape != wanted:
            what = f"{name} {list(shape)} in blocks of {list(self.block)} needs {name + FACTORS} {list(wanted)}"
            return [f"{what}, which is {list(factors.shape)}"]
        return []

    def read(self, name: str) -> Tensor:
        tensor = self._tensors.read(name)
        if name not in self._blocked:
            return tensor
        return multiplied(tensor, self._tensors.read(name + FACTORS), self.block, TYPES[self.wide][0])


def multiplied(numbers: Tensor, factors: Tensor, block: tuple[int, int], wide: torch.dtype) -> Tensor:
    """numbers [o, i] in FP8 times the factors of their blocks, [o / rows, i / columns] rounded up -> [o, i].

    In float32, of which a few rows are held at a time."""
    rows, columns = block
    out = torch.empty(numbers.shape, dtype=wide)
    table = NUMBERS.numpy()
    for strip, some, row in zip(out.split(rows), numbers.split(rows), factors.float(), strict=True):
        found = torch.from_numpy(table.take(some.view(torch.uint8).numpy()))  # five times as fast as some.float()
        strip.copy_(found.mul_(row.repeat_interleave(columns)[: numbers.shape[1]]))
    return out
