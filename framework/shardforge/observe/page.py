"""One HTML file with everything about one or several runs; it opens without a network."""

from __future__ import annotations

import html as escapes
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from shardforge.observe import expert_page
from shardforge.observe.history import History
from shardforge.observe.plots import smooth

POINTS = 4000
"""Steps of one run that the page keeps; longer runs keep the extremes of the loss in each stretch."""


def html(
    histories: Sequence[History],
    recipes: Sequence[Mapping[str, Any]],
    provenance: Sequence[Any] = (),
    samples: Sequence[str] = (),
) -> str:
    """The page. `recipes`, `provenance` (one entry per start) and `samples` stand in the order of `histories`."""
    data = {
        "runs": [
            _run(history, provenance[i] if i < len(provenance) else None, samples[i] if i < len(samples) else "")
            for i, history in enumerate(histories)
        ],
        "recipe": _table(recipes),
    }
    title = ", ".join(history.name for history in histories)
    folder = files("shardforge.observe")
    head, tail = folder.joinpath("page.html").read_text(encoding="utf-8").split("@DATA@")
    parts = {"TITLE": escapes.escape(title)}
    parts |= {name: folder.joinpath(f"page.{name.lower()}").read_text(encoding="utf-8") for name in ("CSS", "JS")}
    if any(history.experts for history in histories):
        parts["JS"] += folder.joinpath("experts.js").read_text(encoding="utf-8")
    return _filled(head, parts) + _script(data) + _filled(tail, parts)


def _filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with every @NAME@ filled in; what comes in is not searched again."""
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], template)


def _script(data: object) -> str:
    """JSON that an HTML parser cannot leave: no `<`, so neither `</script>` nor `<!--`."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _run(history: History, provenance: Any, samples: str) -> dict[str, Any]:
    start = history.starts[-1]
    clock = history.training_seconds()
    series, kept = _series(history), _kept(history.columns["loss"])
    stretch = len(history.steps) // len(kept) if kept else 1
    tokens = history.columns["tokens_seen"]
    experts = {} if history.experts is None else {"experts": expert_page.section(history, history.experts)}
    return experts | {
        "name": history.name,
        "path": str(history.path.parent),
        "weights": start.weights,
        "steps": start.steps,
        "verdict": history.verdict,
        "entropy": history.unigram_entropy,
        "wall": history.wall_seconds,
        "trained": clock[-1] if clock else 0.0,
        "segments": [
            {"from": s.first_step, "to": s.last_step, "layout": s.layout, "ranks": s.world_size}
            for s in history.segments
        ],
        "resumes": [
            {"step": step, "tokens": history.at(step, tokens), "time": history.at(step, clock)}
            for step in history.resumes
        ],
        "x": {name: [values[i] for i in kept] for name, values in _axes(history, clock).items()},
        "y": {name: _thinned(values, kept) for name, values in series.items()},
        # what stays of a long run are extremes: their mean would not be the mean of the run
        "means": {name: _thinned(smooth(values, stretch), kept) for name, values in series.items() if stretch > 1},
        "evals": [
            {
                "step": e.step,
                "tokens": history.at(e.step, tokens),
                "time": history.at(e.step, clock),
                "loss": _number(e.loss),
            }
            for e in history.evals
        ],
        "provenance": provenance,
        "samples": samples,
    }


def _axes(history: History, clock: list[float]) -> dict[str, list[float]]:
    return {"steps": history.columns["step"], "tokens": history.columns["tokens_seen"], "time": clock}


def _series(history: History) -> dict[str, list[float]]:
    """What the page draws over the steps; the peak share is nan where the peak is unknown."""
    column = history.columns
    seconds = column["seconds"]
    flops = _each(column["model_flops"], seconds)
    return {
        "loss": column["loss"],
        "lr": column["lr"],
        "grad_norm": column["grad_norm"],
        "tokens_per_s": _each(column["tokens"], seconds),
        "flops_per_s": flops,
        "share": _each(flops, column["peak_flops"]),
        "data_share": _each(column["data_seconds"], seconds),
        "memory": column["memory_bytes"],
        **({} if history.experts is None else expert_page.series(history.experts)),
        **{f"term: {name}": values for name, values in history.terms.items()},
    }


def _each(top: list[float], bottom: list[float]) -> list[float]:
    return [a / b if b else math.nan for a, b in zip(top, bottom, strict=True)]


def _thinned(values: list[float], kept: list[int]) -> list[float | None]:
    return [_number(values[i]) for i in kept]


def _number(value: float) -> float | None:
    """Six significant digits; None (a gap in the line) for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _kept(losses: list[float]) -> list[int]:
    """Indices that stay: all, or the first and the last step and of each stretch the lowest and the highest loss,
    with a step whose loss is not finite where there is one."""
    count = len(losses)
    if count <= POINTS:
        return list(range(count))
    stretches = POINTS // 3 - 1
    kept = {0, count - 1}
    for part in range(stretches):
        places = range(part * count // stretches, (part + 1) * count // stretches)
        finite = [i for i in places if math.isfinite(losses[i])]
        kept |= {min(finite, key=losses.__getitem__), max(finite, key=losses.__getitem__)} if finite else set()
        kept |= set([i for i in places if not math.isfinite(losses[i])][:1])
    return sorted(kept)


def _table(recipes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per field of any recipe: its value in each run as text, None where the run has no such field."""
    flat = [_flat(recipe) for recipe in recipes]
    names = list(dict.fromkeys(name for recipe in flat for name in recipe))
    return [{"field": name, "values": [recipe.get(name) for recipe in flat]} for name in names]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        out: dict[str, str] = {}
        for key, item in value.items():
            out |= _flat(item, f"{name}.{key}" if name else str(key))
        return out
    return {name: value if isinstance(value, str) else json.dumps(value, default=str)}
