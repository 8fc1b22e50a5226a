"""How the experts of one layer were used in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class ExpertUse(Protocol):
    """What displays and records read of a layer's experts in one step; see `ExpertTally`."""

    @property
    def count(self) -> int: ...

    @property
    def max_vio(self) -> float: ...

    @property
    def dead(self) -> int: ...

    @property
    def entropy_share(self) -> float: ...

    @property
    def drop_rate(self) -> float: ...

    @property
    def bias(self) -> tuple[float, float] | None: ...

    @property
    def relative(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class ExpertTally:
    """Sums over all tokens of all ranks, padding not counted."""

    load: tuple[float, ...]  # assignments to each expert, those without room included
    tokens: float
    entropy: float  # nats of each token's affinities as shares of 1, added up
    dropped: float  # assignments that found no room
    bias: tuple[float, float] | None = None  # least and largest bias on the choice in this step; None without one

    @property
    def count(self) -> int:
        """Experts of the layer."""
        return len(self.load)

    @property
    def relative(self) -> tuple[float, ...]:
        """Each expert's load over the even one: 1 where all get the same."""
        mean = self.mean or 1.0
        return tuple(load / mean for load in self.load)

    @property
    def max_vio(self) -> float:
        """max(load) / mean(load) - 1: 0 where all experts get the same. Wang et al. 2024, arXiv:2408.15664, eq. 4."""
        return max(self.load) / self.mean - 1 if self.mean else 0.0

    @property
    def mean(self) -> float:
        """Assignments to an expert."""
        return sum(self.load) / len(self.load)

    @property
    def dead(self) -> int:
        """Experts that no token chose in this step."""
        return self.load.count(0.0)

    @property
    def min_share(self) -> float:
        """Of all assignments; 1 / experts where all get the same."""
        return min(self.load) / sum(self.load) if self.mean else 0.0

    @property
    def max_share(self) -> float:
        return max(self.load) / sum(self.load) if self.mean else 0.0

    @property
    def mean_entropy(self) -> float:
        """Nats a token: 0 for a router that is sure, ln(experts) for one that knows nothing."""
        return self.entropy / self.tokens if self.tokens else 0.0

    @property
    def entropy_share(self) -> float:
        """Of ln(experts)."""
        return self.mean_entropy / math.log(len(self.load)) if len(self.load) > 1 else 0.0

    @property
    def drop_rate(self) -> float:
        """Share of the assignments that found no room."""
        return self.dropped / sum(self.load) if self.mean else 0.0
