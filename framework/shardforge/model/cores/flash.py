"""The flash-attn package, on documents laid end to end.

Paper: Dao 2023, "FlashAttention-2", arXiv:2307.08691.
Changes: fused; each document is its own sequence, so no mask exists at all. A softcap is the package's own.
Cost: visible pairs only.
Limits: CUDA, float16 or bfloat16, heads of at most 256 channels, causal or windowed masks, no sinks, because the
    package forgets the gradient of the log-sum-exp; needs `pip install 'shardforge[flash]'`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shardforge.core.errors import EngineError, RecipeError
from shardforge.core.log import logger
from shardforge.core.optional import installed, require
from shardforge.core.slots import cores
from shardforge.model.attention import AttentionCore
from shardforge.nn.sequence import Mask, Sequence

WIDEST = 256
"""Channels of a head that the package computes."""


@cores.register("flash")
@dataclass(frozen=True, kw_only=True)
class FlashConfig:
    def build(self, mask: Mask, scale: float, sinks: bool = False, softcap: float | None = None) -> Flash:
        if sinks:
            raise RecipeError(
                "flash-attn has no softmax with sinks, and gives its log-sum-exp no gradient from which to make one",
                "model.core",
                "model.core: auto, flex or sdpa; or sinks: none in every mixer",
            )
        package = require("flash_attn", for_="model.core: flash", extra="flash", field="model.core")
        return Flash(mask, scale, package.flash_attn_varlen_func, softcap)


class Flash(AttentionCore):
    def __init__(self, mask: Mask, scale: float, attend, softcap: float | None = None):
        super().__init__(mask, scale, softcap=softcap)
        self.attend = attend if softcap is None else functools.partial(attend, softcap=softcap)

    def taking(self, width: int) -> AttentionCore:
        if width <= WIDEST:
            return self
        fused = "sdpa" if self.softcap is None else "eager"
        kind = "flex" if torch.cuda.is_available() and installed("triton") else fused
        _tell(kind, width)
        return cores[kind]().build(self.mask, self.scale, softcap=self.softcap)

    def prepare(self, seq: Sequence) -> None:
        seq.prepare("flash", lambda: runs(seq))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seq: Sequence, sinks: Tensor | None = None) -> Tensor:
        if q.is_cuda and q.dtype not in (torch.float16, torch.bfloat16):
            raise EngineError(
                f"flash-attn computes in float16 or bfloat16, and this model in {q.dtype}",
                "model.core",
                "precision.compute: bf16, or model.core: flex",
            )
        if q.is_cuda and max(q.shape[-1], v.shape[-1]) > WIDEST:
            raise EngineError(
                f"flash-attn takes heads of at most {WIDEST} channels, and these have {max(q.shape[-1], v.shape[-1])}",
                "model.core",
                "model.core: flex or sdpa",
            )
        table: Runs = seq.tables["flash"]
        reach = -1 if self.mask.window is None else self.mask.window - 1  # the package counts keys before the query
        width = v.shape[-1]
        q, k, v = equally_wide(*(x.flatten(0, 1) for x in (q, k, v)))
        if table.kept is not None:
            k, v = k.index_select(0, table.kept), v.index_select(0, table.kept)
        y = self.attend(
            q,
            k,
            v,
            table.q_starts,
            table.k_starts,
            table.q_longest,
            table.k_longest,
            softmax_scale=self.scale,
            causal=True,  # where there are more keys than queries, the last query sees the last key
            window_size=(reach, 0),
        )
        return y[..., :width].unflatten(0, seq.documents.shape)


@functools.cache
def _tell(kind: str, width: int) -> None:
    logger("model").info("attention core of heads of %d channels: %s (flash-attn takes %d)", width, kind, WIDEST)


def equally_wide(*heads: Tensor) -> list[Tensor]:
    """Zeros behind the narrower ones, because the package wants one width; they add nothing to scores or values."""
    width = max(x.shape[-1] for x in heads)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in heads]


@dataclass(frozen=True)
class Runs:
    """Documents laid end to end over all rows: cumulative lengths [documents + 1] int32, and the longest length."""

    q_starts: Tensor
    k_starts: Tensor
    q_longest: int
    k_longest: int
    kept: Tensor | None = None  # rows of the flattened keys that belong to a document of the queries; None: all


def runs(seq: Sequence) -> Runs:
    """Each document is a sequence of its own. Keys, where they are not the queries' own tokens, end where those end."""
    starts, longest = document_starts(seq.documents)
    if seq.keys is None:
        return Runs(starts, starts, longest, longest)
    documents = seq.keys.documents
    first = (documents == seq.documents[:, :1]).int().argmax(1)  # earlier keys are of documents without a query
    kept = torch.arange(documents.shape[1], device=documents.device) >= first[:, None]
    row = torch.arange(len(documents), device=documents.device)[:, None]
    names = torch.stack([row.expand_as(documents), documents], -1)[kept]  # [t, 2]
    changes = (names[1:] != names[:-1]).any(-1).nonzero().flatten() + 1
    k_starts = torch.cat([changes.new_zeros(1), changes, changes.new_tensor([len(names)])])
    index = None if bool(kept.all()) else kept.flatten().nonzero().flatten()
    return Runs(starts, k_starts.int(), longest, int(k_starts.diff().max()), index)


def document_starts(documents: Tensor) -> tuple[Tensor, int]:
    """[b, s] -> (cumulative lengths [documents + 1] int32 over the flattened rows, the longest length)."""
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    starts = torch.cat([starts, starts.new_tensor([documents.numel()])])
    return starts.int(), int(starts.diff().max())
