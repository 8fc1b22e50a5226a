"""What report.html holds of a mixture: each layer's numbers over the steps, and loads of layers by experts."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardforge.observe.base import EvalReport
from shardforge.observe.expert_history import ExpertHistory
from shardforge.observe.history import History

COLUMNS = 400
"""Stretches of steps that a layer's numbers are kept of; of each the worst."""

PICTURES, LOADS = 60, 1_000_000
"""Pictures that the page keeps at most, and loads of all of them."""

OCTAVE, EVEN = 24, 128
"""A load of r times the even one is written as the byte EVEN + OCTAVE * log2(r) within 1 to 255; no token is 0."""

WORST: dict[str, np.ufunc] = {
    "max_vio": np.fmax,
    "dead": np.fmax,
    "entropy_share": np.fmin,
    "drop_rate": np.fmax,
    "bias_low": np.fmin,
    "bias_high": np.fmax,
}
"""Series of `ExpertHistory` -> which of two values is the worse."""


def series(experts: ExpertHistory) -> dict[str, list[float]]:
    """What the page draws over steps, of all layers together."""
    out = {"max_vio": experts.most("max_vio"), "dead": experts.total("dead")}
    out["entropy_share"] = experts.mean("entropy_share")
    if experts.told("drop_rate"):
        out["drop_rate"] = experts.mean("drop_rate")
    if experts.told("bias_low"):
        out |= {"bias_low": experts.least("bias_low"), "bias_high": experts.most("bias_high")}
    return out


def section(history: History, experts: ExpertHistory) -> dict[str, Any]:
    """Plain JSON of the section on experts."""
    steps = history.steps
    edges = [i * len(steps) // min(COLUMNS, len(steps)) for i in range(min(COLUMNS, len(steps)))]
    counts = np.fmax.reduce(experts.series["count"], axis=0)
    most = max(3, min(PICTURES, LOADS // max(1, int(np.nansum(counts)))))
    return {
        "layers": experts.layers,
        "steps": [steps[edge] for edge in edges],
        "rows": {
            name: [_list(column) for column in worst.reduceat(experts.series[name], edges, axis=0).T]
            for name, worst in WORST.items()
            if experts.told(name)
        },
        "similarity": _similarity(experts.layers, history.evals),
        "pictures": [
            {"step": picture.step, "rows": [_bytes(loads) for loads in picture.relative]}
            for picture in experts.chosen(most)
        ],
    }


def _similarity(layers: Sequence[int], evals: Sequence[EvalReport]) -> dict[str, Any] | None:
    known = [report for report in evals if report.similarity]
    if not known:
        return None
    rows = [[_short(report.similarity.get(layer, math.nan)) for report in known] for layer in layers]
    return {"steps": [report.step for report in known], "rows": rows}


def _bytes(relative: np.ndarray) -> str:
    """Base64 of a byte an expert."""
    alive = relative > 0
    powers = np.log2(relative, out=np.zeros_like(relative), where=alive)
    levels = np.where(alive, np.clip(np.round(EVEN + OCTAVE * powers), 1, 255), 0)
    return base64.b64encode(levels.astype(np.uint8).tobytes()).decode()


def _list(values: np.ndarray) -> list[float | None]:
    return [_short(value) for value in values.tolist()]


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
