"""What an upcycling did, by layer and matrix: as data, as a table, as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from shardforge.checkpoint.tensorfile import write_whole
from shardforge.recipe.provenance import plain
from shardforge.upcycle import page
from shardforge.upcycle.options import Options
from shardforge.upcycle.plan import Plan
from shardforge.upcycle.target import Layer, Target, factors

DATA, PAGE = "report.json", "report.html"
VERDICTS = {
    "exact": "computes what the source does",
    "even": "computes what the source does where router probabilities are even",
    "near": "computes nearly what the source does",
    "no": "does not compute what the source does",
}
MEASURES = (
    "redrawn", "source_mean", "source_std", "mean", "std", "cosine_to_dense", "cosine_between_experts",
)  # fmt: skip


def collect(plan: Plan, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report as plain data, from what each layer measured."""
    layers = sorted(layers, key=lambda each: each["layer"])
    matrices = {name: None for layer in layers for name in layer["matrices"]}
    return {
        "source": str(plan.source),
        "options": plain(plan.options),
        "weights": _weights(plan),
        "step_0": preservation(plan.options, plan.target),
        "notes": notes(plan.options),
        "matrices": {
            name: {key: _mean([layer["matrices"][name][key] for layer in layers]) for key in MEASURES}
            for name in matrices
        },
        "output_cosine_to_dense": _mean([layer["output_cosine_to_dense"] for layer in layers]),
        "output_cosine_between_experts": _mean([layer["output_cosine_between_experts"] for layer in layers]),
        "layers": list(layers),
        "loss": None,
    }


def save(output: Path, found: Mapping[str, Any]) -> None:
    write_whole(output / DATA, json.dumps(found, indent=1).encode() + b"\n")
    write_whole(output / PAGE, page.html(found).encode())


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / DATA).read_bytes())


def preservation(options: Options, target: Target) -> dict[str, Any]:
    """Whether the result computes what the source does before its first step: a key of VERDICTS, why, and what to
    give for it. The worst layer's verdict is that of all."""
    layers = [_kept(options, layer) for layer in target.layers]
    return {
        "verdict": max((verdict for verdict, _, _ in layers), key=list(VERDICTS).index),
        "reasons": list(dict.fromkeys(reason for _, reasons, _ in layers for reason in reasons)),
        "fixes": list(dict.fromkeys(fix for _, _, fixes in layers for fix in fixes)),
    }


def _kept(options: Options, layer: Layer) -> tuple[str, list[str], list[str]]:
    """Verdict, reasons and fixes of one layer."""
    reasons, fixes, verdict = [], [], "exact"
    if not options.method.unchanged:
        reasons.append(f"method {options.method.kind} changes the experts")
    if options.shared:
        reasons.append("the shared expert adds to what the others make up already")
    if layer.expert * layer.group != layer.dense:
        reasons.append(f"an expert has {layer.expert} of {layer.dense} neurons")
        fixes.append("method: virtual_group routes to all of them")
    wanted = factors(replace(options, scale="virtual_group"), layer.dense, layer.expert, layer.degree)[0]
    if wanted != layer.factor:
        reasons.append(f"the chosen experts give about 1/{wanted**layer.degree:.4g} of the dense output")
        fixes.append("--scale virtual_group makes up for it")
    if reasons:
        verdict = "no"
    elif layer.factor != 1.0 and layer.activation not in ("relu", "relu2"):
        verdict = "near"
        reasons.append(f"{layer.activation} of a scaled matrix is not the scaled {layer.activation}")
    elif layer.factor != 1.0 and options.gate == "raw":
        verdict = "even"
    if layer.factor != 1.0 and options.gate == "raw":
        reasons.append("the factor holds where router probabilities are even; --gate renormalized needs none for them")
    return verdict, reasons, fixes


def notes(options: Options) -> list[str]:
    """What is allowed and worth a thought."""
    found = []
    if options.k == 1 and options.gate != "raw":
        found.append("with k=1 these gates are always 1, and the router learns from the balance loss alone: --gate raw")
    if options.moments == "carry":
        found.append(
            "the moments of neurons that were drawn anew are 0; train.start_moments in recipe.yaml: carried begins "
            "with all of them, dropped with a fresh optimizer"
        )
    return found


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table by matrix, means over layers: a head and a row each."""
    head = ["matrix", "redrawn", "mean", "source mean", "std", "source std", "cosine to dense", "between experts"]
    out = [head]
    for name, each in found["matrices"].items():
        numbers = ("mean", "source_mean", "std", "source_std")
        cosines = [shown(each["cosine_to_dense"]), shown(each["cosine_between_experts"])]
        out.append([name, f"{each['redrawn']:.1%}", *[f"{each[key]:.3g}" for key in numbers], *cosines])
    ends = [shown(found["output_cosine_to_dense"]), shown(found["output_cosine_between_experts"])]
    return [*out, ["output", *[""] * 5, *ends]]


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _weights(plan: Plan) -> dict[str, int]:
    """Numbers in all weights, and those that a token meets."""
    total = inactive = 0
    for name, row in plan.target.table.items():
        if name in plan.target.buffers:
            continue
        numbers = prod(row["shape"])
        total += numbers
        if ".ffn.experts." in name and any(name.startswith(f"blocks.{each.number}.") for each in plan.target.layers):
            inactive += numbers // plan.options.experts * (plan.options.experts - plan.options.k)
    return {"total": total, "active": total - inactive}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
