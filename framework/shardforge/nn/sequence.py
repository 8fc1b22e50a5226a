"""Where each token stands: positions, documents, rows. The same for every layer of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from shardforge.nn.batch import Batch


@dataclass(frozen=True)
class Shares:
    """What a sum over this micro-batch is a share of: sizes of the whole batch of the step, over all ranks."""

    tokens: int = 1  # positions that hold a token of a document
    sequences: int = 1  # those that hold a token; a row of padding counts nowhere
    ahead: tuple[Shares, ...] = ()  # of the positions whose document goes on for 1, 2, ... tokens: Batch.look_ahead

    def further(self, j: int) -> Shares:
        """For modules that see no position but these, those of ahead[j]."""
        return self.ahead[j] if self.ahead else self


@dataclass(frozen=True)
class Places:
    """Where tokens stand."""

    positions: Tensor  # [b, t] distance from the start of the document
    documents: Tensor  # [b, t] equal numbers see each other

    def at(self, part: slice) -> Places:
        return Places(self.positions[:, part], self.documents[:, part])


@dataclass
class Sequence:
    """One micro-batch as one context-parallel rank sees it; `s` of the `length` tokens of each sequence are here.

    Between slots a tp rank holds a part of these s tokens; positions and documents are of all s.
    """

    positions: Tensor  # [b, s] distance from the start of the document
    documents: Tensor  # [b, s] equal numbers see each other
    rows: Tensor  # [b] index of each sequence in the whole batch of the step
    key: Tensor | None = None  # 0-d int64, from which all chance of the step follows; None in evaluation
    dtype: torch.dtype = torch.float32  # of position tables: float32, or float64 in a float64 model
    tables: dict[Hashable, Any] = field(default_factory=dict)
    keys: Places | None = None  # of the keys that an attention core gets, where they are not of the s tokens alone
    index: Tensor | None = None  # [s] place of each token in the whole sequence; None: 0 ... s - 1
    length: int | None = None  # tokens of a whole sequence; None: s
    shares: Shares = Shares()
    records: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    loads: Mapping[int, Tensor] | None = None  # by layer: the tally "load" [e] of the whole batch of this step
    progress: float = 0.0  # share of the run's steps that are done
    ahead: tuple[Batch, ...] = ()  # as in Batch, for a model that predicts further tokens

    def record(self, name: str, layer: int, value: Tensor) -> None:
        """Note this rank's part of a sum over this micro-batch; the engine adds over micro-batches and ranks.

        Names in a module's `records` are 0-d and added over layers too; those in its `tallies` are vectors, kept layer
        by layer. A recomputed block notes the same value again, which changes nothing.
        """
        self.records[name, layer] = value.detach()

    @property
    def training(self) -> bool:
        return self.key is not None

    def prepare(self, name: Hashable, make: Callable[[], Any]) -> None:
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


def seen(mask: Mask, queries: Sequence | Places, keys: Sequence | Places) -> Tensor:
    """Which keys each query sees, [b, s, t]: those of its document that the mask leaves visible."""
    same = queries.documents[:, :, None] == keys.documents[:, None, :]
    return same & mask.visible(queries.positions[:, :, None], keys.positions[:, None, :])


def visible(mask: Mask, seq: Sequence) -> Tensor:
    """The dense mask [b, 1, s, t] of the queries and keys that a core gets."""
    return seen(mask, seq, seq.keys or seq)[:, None]
