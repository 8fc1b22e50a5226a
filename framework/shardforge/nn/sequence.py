"""Where each token stands: positions, documents, rows. The same for every layer of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Sequence:
    """One micro-batch as the model sees it. All positions are of the whole sequence, also where x is split."""

    positions: Tensor  # [b, s] distance from the start of the document
    documents: Tensor  # [b, s] equal numbers see each other
    rows: Tensor  # [b] index of each sequence in the whole batch of the step
    key: Tensor | None = None  # 0-d int64, the dropout key of the step; None when nothing is dropped
    dtype: torch.dtype = torch.float32  # of position tables: float32, or float64 in a float64 model
    tables: dict[Hashable, Tensor | tuple[Tensor, ...]] = field(default_factory=dict)

    def prepare(self, name: Hashable, make: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
        """Compute a table once, before the blocks; blocks read it from `tables`."""
        if name not in self.tables:
            self.tables[name] = make()


class Mask(Protocol):
    """Which earlier positions of its document a position sees. A frozen dataclass, so it can name a table."""

    def visible(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """[..., s, 1] and [..., 1, t] positions in the document -> bool [..., s, t]."""
        ...

    def keys(self, length: int) -> int:
        """Keys seen by all positions of one document of `length` tokens together."""
        ...

    @property
    def window(self) -> int | None:
        """Keys seen at most, the position itself included; None without a limit."""
        ...


def visible(mask: Mask, seq: Sequence) -> Tensor:
    """The dense mask [b, 1, s, s]: same document and visible by the mask."""
    pos, doc = seq.positions, seq.documents
    same = doc[:, :, None] == doc[:, None, :]
    return (same & mask.visible(pos[:, :, None], pos[:, None, :]))[:, None]
