"""The fastest core that this machine and this model allow; which one and why is logged once.

Paper: none; a choice among the other kinds.
Changes: nothing; all cores compute the same function.
Cost: of the core chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from shardforge.core.log import logger
from shardforge.core.optional import installed
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask


@cores.register("auto")
@dataclass(frozen=True, kw_only=True)
class AutoConfig:
    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> AttentionCore:
        here = torch.cuda.is_available(), installed("flash_attn_2_cuda"), installed("triton")
        kind, reason = choose(*here, sinks, softcap is not None)
        _tell(kind, reason)
        return cores[kind]().build(mask, scale, sinks, softcap)


def choose(cuda: bool, flash: bool, triton: bool, sinks: bool = False, softcap: bool = False) -> tuple[str, str]:
    """(kind, reason)."""
    if not cuda and softcap:
        return "eager", "no CUDA device, and torch's fused attention has no softcap; every score is in memory"
    if not cuda:
        return "sdpa", "no CUDA device; torch's fused attention is the fastest that trains on CPU"
    if flash and not sinks:
        return "flash", "CUDA device and flash-attn are here"
    lack = "with sinks, which flash-attn cannot train" if flash else "without flash-attn"
    if triton:
        return "flex", f"CUDA device {lack}; FlexAttention skips what the mask hides"
    if softcap:
        return "eager", f"CUDA device {lack}, and without triton; torch's fused attention has no softcap"
    return "sdpa", f"CUDA device {lack}, and without triton"


@functools.cache
def _tell(kind: str, reason: str) -> None:
    logger("model").info("attention core: %s (%s)", kind, reason)
