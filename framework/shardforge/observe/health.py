"""What is worth knowing of a run's experts: the record of each step, and when to worry.

A line of metrics.jsonl has under "experts" lists with one entry a layer, of four significant digits:

    {"layer": [1, 2], "count": [64, 64], "max_vio": [0.4, 7.1], "dead": [0, 9], "entropy_share": [0.9, 0.3],
     "drop_rate": [0.0, 0.1], "bias": [[-0.1, 0.2], [0.0, 0.0]], "relative": [[1.01, ...], [0, ...]]}

drop_rate is absent where nothing was dropped, bias where no router has one. The loads themselves, `relative`, come in
each step of a life that is the first, the last or a multiple of `stride`, so that a line has about LOADS of them in
the mean: all of 8 layers of 32 experts are in every line, those of 58 layers of 256 in every 58th.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shardforge.observe.experts import ExpertUse

LOADS = 256

NUMBERS = ("count", "max_vio", "dead", "entropy_share", "drop_rate")
"""Of each layer and step, as named in ExpertUse."""

BUSY, SWAMPED = 2.0, 5.0
"""MaxVio beyond which a layer is worth a look, and from which it is collapsing: the fullest expert has 3 and 6 times
the even load. Wang et al. 2024, arXiv:2408.15664, found 0.04 to 0.72 over a validation set in balanced models."""

LOST = 1 / 8
"""Share of dead experts from which a layer is collapsing."""

Level = Literal["good", "watch", "bad"]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A layer's experts in one step as the record has them; see `ExpertTally`."""

    count: int
    max_vio: float
    dead: int
    entropy_share: float
    drop_rate: float = 0.0
    bias: tuple[float, float] | None = None
    relative: tuple[float, ...] = ()  # empty where the line has no loads


@dataclass(frozen=True, kw_only=True)
class Health:
    """All layers of a step."""

    worst: int  # the layer with the largest MaxVio
    max_vio: float  # there
    dead: int  # experts of all layers without a token
    count: int  # experts of all layers
    entropy_share: float  # mean over layers
    drop_rate: float  # mean over layers
    bias: tuple[float, float] | None  # least and largest of all layers
    level: Level  # of the layer that is worst off

    @classmethod
    def of(cls, experts: Mapping[int, ExpertUse]) -> Health:
        """Of at least one layer."""
        uses = list(experts.values())
        worst = max(experts, key=lambda layer: _order(experts[layer].max_vio))
        levels = [level(use) for use in uses]
        biases = [use.bias for use in uses if use.bias is not None]
        return cls(
            worst=worst,
            max_vio=experts[worst].max_vio,
            dead=sum(use.dead for use in uses),
            count=sum(use.count for use in uses),
            entropy_share=sum(use.entropy_share for use in uses) / len(uses),
            drop_rate=sum(use.drop_rate for use in uses) / len(uses),
            bias=(min(low for low, _ in biases), max(high for _, high in biases)) if biases else None,
            level="bad" if "bad" in levels else "watch" if "watch" in levels else "good",
        )


def level(use: ExpertUse) -> Level:
    """good: every expert has work and none much more than its share; bad: the layer is collapsing; else watch."""
    if use.dead >= max(1, LOST * use.count) or use.max_vio >= SWAMPED:
        return "bad"
    return "watch" if use.dead or use.max_vio > BUSY else "good"


def warning(experts: Mapping[int, ExpertUse]) -> str:
    """One line about layers that are collapsing or near it; empty when all is well."""
    ill = [layer for layer, use in experts.items() if level(use) != "good"]
    if not ill:
        return ""
    health = Health.of(experts)
    told = [f"MaxVio {health.max_vio:.2f} in layer {health.worst}"]
    if health.dead:
        most = max(experts, key=lambda layer: experts[layer].dead)
        told.append(
            f"{health.dead} of {health.count} without a token, most in layer {most}: "
            f"{experts[most].dead} of {experts[most].count}"
        )
    word = "collapsing" if health.level == "bad" else "uneven"
    return f"experts {word} in {len(ill)} of {len(experts)} layers: {'; '.join(told)}"


def stride(experts: Mapping[int, ExpertUse]) -> int:
    """Steps from one record of all loads to the next."""
    return max(1, math.ceil(sum(use.count for use in experts.values()) / LOADS))


def record(experts: Mapping[int, ExpertUse], *, loads: bool) -> dict[str, Any]:
    """Plain JSON of a step, with or without the loads."""
    uses = list(experts.values())
    out: dict[str, Any] = {"layer": list(experts)}
    out |= {name: _rounded(getattr(use, name) for use in uses) for name in NUMBERS}
    if not any(use.drop_rate for use in uses):
        del out["drop_rate"]
    if any(use.bias for use in uses):
        out["bias"] = [None if use.bias is None else _rounded(use.bias) for use in uses]
    if loads:
        out["relative"] = [_rounded(use.relative) for use in uses]
    return out


def recall(told: Mapping[str, Any]) -> dict[int, ExpertUse]:
    """What `record` wrote, by layer."""
    out: dict[int, ExpertUse] = {}
    for row, layer in enumerate(told["layer"]):
        numbers = {name: _number(told[name][row]) for name in NUMBERS if name in told}
        bias = told["bias"][row] if "bias" in told else None
        out[layer] = Recorded(
            **numbers,  # type: ignore[arg-type]
            bias=None if bias is None else (_number(bias[0]), _number(bias[1])),
            relative=tuple(map(_number, told["relative"][row])) if "relative" in told else (),
        )
    return out


def _rounded(values: Iterable[float]) -> list[float | None]:
    """Four significant digits, whole numbers as such; None for what is not finite."""
    return [_short(value) for value in values]


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = value if isinstance(value, int) else float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _order(value: float) -> float:
    """nan is worse than any number."""
    return math.inf if math.isnan(value) else value
