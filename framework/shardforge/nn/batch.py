"""What one data rank reads for one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter

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
    ahead: tuple[Batch, ...] = ()  # the same places with the tokens 1, 2, ... further on, see `look_ahead`

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def split(self, size: int) -> Iterator[Batch]:
        """Pieces of `size` sequences, in order; the last may be smaller."""
        for start in range(0, len(self), size):
            yield self._each(itemgetter(slice(start, start + size)))

    def at(self, index: Tensor) -> Batch:
        """The columns `index` [s] of every row."""
        return self._each(lambda x: x[:, index] if x.dim() > 1 else x)

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def look_ahead(self, depth: int) -> Batch:
        """This batch with `ahead` for 1 ... `depth` tokens further on. Its rows must be whole.

        Place i of ahead[j - 1] has token, label and position of place i + j. Where that is outside the row or of
        another document the label is IGNORE and the document PADDING; token and position are then place i's own.
        """
        return replace(self, ahead=tuple(self._further(j) for j in range(1, depth + 1)))

    def _further(self, j: int) -> Batch:
        place = torch.arange(j, j + self.tokens.shape[1], device=self.tokens.device)
        there = place.clamp(max=self.tokens.shape[1] - 1)
        known = (place == there) & (self.documents[:, there] == self.documents) & (self.documents != PADDING)
        return Batch(
            tokens=self.tokens[:, there].where(known, self.tokens),
            labels=self.labels[:, there].where(known, IGNORE),
            positions=self.positions[:, there].where(known, self.positions),
            documents=self.documents.where(known, PADDING),
            rows=self.rows,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        own = {f.name: change(getattr(self, f.name)) for f in fields(self) if f.name != "ahead"}
        return Batch(**own, ahead=tuple(batch._each(change) for batch in self.ahead))
