"""The forward passes of one step over its micro-batches, and the sums that they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from shardforge.engine.notes import Key, Notes
from shardforge.model.decoder import Decoder
from shardforge.nn import sequence
from shardforge.nn.batch import Batch


class Forward:
    """`forward(part, x, micro)` runs a decoder, or a stage of one, on a micro-batch; see `parallel.pipeline.Work`.

    `sums` has every name on every rank, whatever part of the model it runs: terms of the objective and what modules
    record, summed over layers and micro-batches; `tallies` are vectors of a layer, summed over micro-batches.
    """

    def __init__(
        self,
        pieces: Sequence[Batch],
        place: Callable[[Batch], sequence.Sequence],
        terms: Sequence[str],
        notes: Notes,
        scored: int,
    ):
        self.pieces, self.place, self.scored = pieces, place, scored
        self.terms, self.notes = terms, notes
        self.begin()

    def begin(self, loads: Mapping[int, Tensor] | None = None) -> None:
        """Forget all sums. `loads` are what the passes from here on are told, see `nn.sequence.Sequence`."""
        self.loads, device = loads, self.pieces[0].tokens.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.sums: dict[str, Tensor] = dict.fromkeys((*self.terms, *self.notes.records), zero)
        self.tallies: dict[Key, Tensor] = {
            key: torch.zeros(length, dtype=torch.float64, device=device) for key, length in self.notes.tallies.items()
        }

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(self, part: Decoder, x: Tensor | None, micro: int) -> Tensor:
        """The stream; or, where the objective is, this micro-batch's part of the mean loss of the step, 0-d."""
        piece = self.pieces[micro]
        seq = self.place(piece)
        seq.loads = self.loads
        out = part(piece.tokens if x is None else x, seq, piece.labels)
        for (name, layer), value in seq.records.items():
            if (layer, name) in self.tallies:
                self.tallies[layer, name] = self.tallies[layer, name] + value
            else:
                self.sums[name] = self.sums[name] + value
        if isinstance(out, Tensor):
            return out
        for name in self.terms:
            self.sums[name] = self.sums[name] + out[name].detach()
        return out["total"] / max(1, self.scored)
