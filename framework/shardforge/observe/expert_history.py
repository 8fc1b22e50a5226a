"""How the experts of a run were used over its steps, packed: a long run of a large mixture has 10^8 numbers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shardforge.observe.health import NUMBERS

BOUNDS = ("bias_low", "bias_high")
SERIES = (*NUMBERS, *BOUNDS)
"""Names of `ExpertHistory.series`."""


@dataclass(frozen=True)
class Picture:
    """Loads over the even one, of every layer and expert at one step."""

    step: int
    relative: list[np.ndarray]  # [e] of each layer, float32; none where not told


@dataclass(kw_only=True)
class ExpertHistory:
    """One run; rows are its kept steps, columns its `layers`."""

    layers: list[int]
    series: Mapping[str, np.ndarray]  # name -> [steps, layers] float32; none where not told
    pictures: list[Picture] = field(default_factory=list)

    def told(self, name: str) -> bool:
        """Whether there is something to see of it: nothing dropped is nothing to see."""
        values = self.series[name]
        return bool((values > 0).any()) if name == "drop_rate" else bool(np.isfinite(values).any())

    def most(self, name: str) -> list[float]:
        """Each step's largest value over layers; nan where no layer has one, here and below."""
        return np.fmax.reduce(self.series[name], axis=1).tolist()

    def least(self, name: str) -> list[float]:
        return np.fmin.reduce(self.series[name], axis=1).tolist()

    def total(self, name: str) -> list[float]:
        return self.series[name].sum(axis=1).tolist()

    def mean(self, name: str) -> list[float]:
        return self.series[name].mean(axis=1).tolist()

    def chosen(self, most: int) -> list[Picture]:
        """At most that many pictures, evenly spread, the first and the last among them."""
        count = len(self.pictures)
        if count <= most:
            return self.pictures
        places = sorted({round(i * (count - 1) / (most - 1)) for i in range(most)}) if most > 1 else [count - 1]
        return [self.pictures[place] for place in places]


def packed(told: Mapping[str, Any]) -> dict[str, Any]:
    """The entry "experts" of a step (see `health`) with arrays for lists."""
    out: dict[str, Any] = {"layer": tuple(told["layer"])}
    out |= {name: np.array(told[name], np.float32) for name in NUMBERS if name in told}
    if "bias" in told:
        pairs = np.array([pair or (None, None) for pair in told["bias"]], np.float32)
        out |= dict(zip(BOUNDS, pairs.T.copy(), strict=True))
    if "relative" in told:
        out["relative"] = [np.array(loads, np.float32) for loads in told["relative"]]
    return out


def gathered(rows: Sequence[Mapping[str, Any]]) -> ExpertHistory | None:
    """The history in step events whose "experts" are `packed`; None of a run without experts."""
    told = [(row, event["experts"]) for row, event in enumerate(rows) if event.get("experts")]
    if not told:
        return None
    layers = sorted({layer for _, entry in told for layer in entry["layer"]})
    column = {layer: place for place, layer in enumerate(layers)}
    series = {name: np.full((len(rows), len(layers)), np.nan, np.float32) for name in SERIES}
    pictures = []
    for row, entry in told:
        places = [column[layer] for layer in entry["layer"]]
        for name in SERIES:
            if name in entry:
                series[name][row, places] = entry[name]
        if "drop_rate" not in entry:  # nothing was dropped
            series["drop_rate"][row, places] = 0.0
        if "relative" in entry:
            loads = dict(zip(entry["layer"], entry["relative"], strict=True))
            pictures.append(Picture(rows[row]["step"], [loads.get(layer, np.empty(0, np.float32)) for layer in layers]))
    if not pictures:  # the first step of every life has one: somebody took lines out
        return None
    return ExpertHistory(layers=layers, series=series, pictures=pictures)
