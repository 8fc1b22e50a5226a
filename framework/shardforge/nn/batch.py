"""What one data rank reads for one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored."""

PADDING = -1
"""Document id of a position that holds no token of any document."""


@dataclass(frozen=True)
class Batch:
    """All of shape [b, s], int64, but `rows`. Documents are numbered inside each row, in order."""

    tokens: Tensor
    labels: Tensor  # token to predict at each position, or IGNORE
    positions: Tensor  # distance from the start of the document
    documents: Tensor  # equal numbers see each other; PADDING sees nothing that counts
    rows: Tensor  # [b] index of each sequence in the whole batch of this step, over all ranks

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, size: int) -> Iterator[Batch]:
        """Pieces of `size` sequences, in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield Batch(*(getattr(self, f.name)[start : start + size] for f in fields(self)))

    def at(self, index: Tensor) -> Batch:
        """The columns `index` [s] of every row."""
        columns = {f.name: getattr(self, f.name)[:, index] for f in fields(self) if f.name != "rows"}
        return Batch(**columns, rows=self.rows)

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))
