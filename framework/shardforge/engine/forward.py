"""The forward passes of one step over its micro-batches, and the sums that they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardforge.model.decoder import Decoder
from shardforge.nn import sequence
from shardforge.nn.batch import Batch


class Forward:
    """`forward(part, x, micro)` runs a decoder, or a stage of one, on a micro-batch; see `parallel.pipeline.Work`.

    `sums` has every name on every rank, whatever part of the model it runs: terms of the objective and what blocks
    record, summed over layers and micro-batches.
    """

    def __init__(
        self,
        pieces: Sequence[Batch],
        place: Callable[[Batch], sequence.Sequence],
        terms: Sequence[str],
        records: Sequence[str],
        scored: int,
    ):
        self.pieces, self.place, self.scored = pieces, place, scored
        self.terms, self.records = terms, records
        zero = torch.zeros((), dtype=torch.float64, device=pieces[0].tokens.device)
        self.sums: dict[str, Tensor] = dict.fromkeys((*terms, *records), zero)

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, part: Decoder, x: Tensor | None, micro: int) -> Tensor:
        """The stream; or, where the objective is, this micro-batch's part of the mean loss of the step, 0-d."""
        piece = self.pieces[micro]
        seq = self.place(piece)
        out = part(piece.tokens if x is None else x, seq, piece.labels)
        for (name, _), value in seq.records.items():
            self.sums[name] = self.sums[name] + value
        if isinstance(out, Tensor):
            return out
        for name in self.terms:
            self.sums[name] = self.sums[name] + out[name].detach()
        return out["total"] / max(1, self.scored)
