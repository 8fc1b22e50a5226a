"""Experts that gpt-oss released in MXFP4: numbers of 4 bits, 32 of which share a power of two.

Paper: Rouhani et al. 2023, "Microscaling Data Formats for Deep Learning", arXiv:2310.10537, and OCP Microscaling
    Formats (MX) Specification 1.0: an E2M1 number times 2^(scale - 127), the scale an E8M0. Layout of the files: the
    weights released with OpenAI 2025, gpt-oss, arXiv:2508.10925: NAME_blocks uint8 [e, out, in / 32, 16], the earlier
    of two numbers in the lower half of a byte, and NAME_scales uint8 [e, out, in / 32].
Limits: bfloat16 holds every such number up to its own range, 2^128, exactly; a scale of 255 is no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from shardforge.families.linked import Tensors
from shardforge.families.settings import Settings
from shardforge.families.source import Info

BLOCKS, SCALES = "_blocks", "_scales"
BYTE, WIDE = "uint8", "bfloat16"
BLOCK, BYTES = 32, 16
"""Numbers that share a scale, and the bytes that they take."""
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign, which is the highest of four bits."""
BIAS, NO_NUMBER = 127, 255


def decoded(tensors: Tensors, settings: Settings) -> Tensors:
    """The tensors as they are without `quantization_config`, else with weights in place of blocks and scales. What is
    not MXFP4, and blocks and scales that do not belong together, is noted in the settings."""
    told = settings.get("quantization_config")
    if told is None:
        return tensors
    method = told.get("quant_method") if isinstance(told, dict) else told
    if method != "mxfp4":
        settings.wrong(f"quantization_config: quant_method={method!r} is not supported here, only 'mxfp4'")
        return tensors
    found = Packed(tensors)
    for what in found.lacking():
        settings.wrong(what)
    return found


class Packed:
    """See `families.linked.Tensors`. NAME_blocks [e, out, i, 16] and NAME_scales [e, out, i] are one tensor NAME
    [e, 32 i, out] in bfloat16, as the classes of transformers hold it; all others are as they are."""

    def __init__(self, tensors: Tensors):
        self.path, self._tensors = tensors.path, tensors
        ends = (BLOCKS, SCALES)
        packed = dict.fromkeys(name.removesuffix(end) for name in tensors.names for end in ends if name.endswith(end))
        self._packed = list(packed)
        plain = {name: info for name, info in tensors.names.items() if not name.endswith(ends)}
        self.names: Mapping[str, Info] = plain | {name: Info(self._shape(name), WIDE) for name in self._packed}

    def lacking(self) -> list[str]:
        """Blocks without their scales and the reverse, or of shapes that cannot be, a line each."""
        return list(chain.from_iterable(self._lacking(name) for name in self._packed))

    def read(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._tensors.read(name)
        return unpacked(self._tensors.read(name + BLOCKS), self._tensors.read(name + SCALES))

    def _shape(self, name: str) -> tuple[int, ...]:
        info = self._tensors.names.get(name + BLOCKS)
        if info is None or len(info.shape) != 4:
            return ()
        experts, rows, blocks, _ = info.shape
        return experts, blocks * BLOCK, rows

    def _lacking(self, name: str) -> list[str]:
        blocks, scales = (self._tensors.names.get(name + end) for end in (BLOCKS, SCALES))
        if blocks is None or scales is None:
            here, absent = (BLOCKS, SCALES) if scales is None else (SCALES, BLOCKS)
            return [f"there is {name + here}, and no {name + absent}"]
        lines = [
            f"{name + end} is {info.dtype}, not {BYTE}"
            for end, info in ((BLOCKS, blocks), (SCALES, scales))
            if info.dtype != BYTE
        ]
        if len(blocks.shape) != 4 or blocks.shape[-1] != BYTES or scales.shape != blocks.shape[:-1]:
            shapes = f"{name + BLOCKS} {list(blocks.shape)} and {name + SCALES} {list(scales.shape)}"
            lines.append(f"{shapes} are not [e, out, in / {BLOCK}, {BYTES}] and the same without the last")
        return lines


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [e, out, i, 16] and scales [e, out, i], uint8 -> [e, 32 i, out] bfloat16; an expert at a time."""
    experts, rows, count, _ = blocks.shape
    pairs, powers = _pairs(), _powers()
    out = torch.empty(experts, count * BLOCK, rows, dtype=torch.bfloat16)
    for expert, packed, scale in zip(out, blocks, scales, strict=True):
        two = pairs.index_select(0, packed.flatten().int())  # both numbers of a byte in four bytes
        numbers = two.view(torch.bfloat16).view(rows, count, BLOCK)
        power = powers.index_select(0, scale.flatten().int()).view(rows, count, 1)
        expert.copy_(numbers.mul_(power).flatten(1).T)
    return out


def _pairs() -> Tensor:
    """[256] int32: for each byte its lower and its upper number, in bfloat16, as they lie in memory."""
    numbers = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([numbers[byte % 16], numbers[byte // 16]], -1).view(torch.int32).flatten()


def _powers() -> Tensor:
    """[256] bfloat16: what each scale stands for."""
    powers: Any = torch.ldexp(torch.ones(256, dtype=torch.float64), torch.arange(256) - BIAS)
    powers[NO_NUMBER] = torch.nan
    return powers.to(torch.bfloat16)
