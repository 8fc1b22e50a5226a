"""What a comparison with peers comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """Seconds of the fastest turn of each, and ours / theirs: of the fastest turns, and in the median pair."""

    ours: float
    theirs: dict[str, float]
    fastest: dict[str, float]
    median: dict[str, float]
