"""The report as one HTML file that opens without a network."""

from __future__ import annotations

import html as escapes
from collections.abc import Iterator, Mapping
from typing import Any

from shardforge.core.units import count
from shardforge.recipe.provenance import inline

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 2em; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e5e7eb }
th:first-child, td:first-child { text-align: left } th { color: #6b7280; font-weight: 500 }
dl { display: grid; grid-template-columns: max-content auto; gap: .2em 1.5em } dt { color: #6b7280 } dd { margin: 0 }
@media (prefers-color-scheme: dark) { body { color: #e5e7eb; background: #111827 } th, td { border-color: #374151 } }
"""
HEADS = (
    "layer", "matrix", "redrawn", "mean", "source mean", "std", "source std", "cosine to dense", "between experts",
)  # fmt: skip
KEYS = ("mean", "source_mean", "std", "source_std")


def html(found: Mapping[str, Any]) -> str:
    """`found` is `report.collect`'s."""
    title = f"{found['options']['method']['kind']} upcycling of {found['source']}"
    body = [f"<h1>{escapes.escape(title)}</h1>", _facts(found), "<h2>Means over layers</h2>", _table(_means(found))]
    body += ["<h2>Layers</h2>", _table(_layers(found)), f"<p>{NOTE}</p>"]
    head = f'<meta charset="utf-8"><title>{escapes.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head>\n<body>{''.join(body)}</body></html>\n"


NOTE = (
    "Means, deviations and cosines of weights are taken from the middle hidden channels of each matrix; cosines of "
    "outputs from random normal inputs and the first experts. Experts are compared neuron by neuron of the dense ffn. "
    "Where a share r of the neurons is drawn anew, theory gives 1 - r to the dense ffn and (1 - r)&sup2; between "
    "experts; (1 - r)&sup3; to the dense output where each matrix draws its own."
)


def _facts(found: Mapping[str, Any]) -> str:
    step = found["step_0"]
    facts = {
        "weights": f"{count(found['weights']['total'])}, of which a token meets {count(found['weights']['active'])}"
    }
    facts["same as the source at step 0"] = "; ".join([step["verdict"], *step["reasons"], *step["fixes"]])
    facts |= {"note": "; ".join(found["notes"])} if found["notes"] else {}
    facts |= {name: inline(value) for name, value in found["options"].items()}
    if loss := found["loss"]:
        facts["loss of the source"] = f"{loss['dense']:.6f} nats a token over {loss['tokens']} tokens of {loss['text']}"
        facts["loss at step 0"] = f"{loss['moe']:.6f}"
    pairs = "".join(f"<dt>{escapes.escape(k)}</dt><dd>{escapes.escape(str(v))}</dd>" for k, v in facts.items())
    return f"<dl>{pairs}</dl>"


def _means(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, each in found["matrices"].items():
        yield ["all", name, *_cells(each)]
    yield ["all", "output", *[""] * 5, _cosine(found, "output_cosine_to_dense"), _between(found)]


def _layers(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for layer in found["layers"]:
        for name, each in layer["matrices"].items():
            yield [str(layer["layer"]), name, *_cells(each)]
        yield [str(layer["layer"]), "output", *[""] * 5, _cosine(layer, "output_cosine_to_dense"), _between(layer)]


def _between(of: Mapping[str, Any]) -> str:
    return _cosine(of, "output_cosine_between_experts")


def _cells(each: Mapping[str, Any]) -> list[str]:
    numbers = [f"{each[key]:.3g}" for key in KEYS]
    return [
        f"{each['redrawn']:.1%}",
        *numbers,
        _cosine(each, "cosine_to_dense"),
        _cosine(each, "cosine_between_experts"),
    ]


def _cosine(of: Mapping[str, Any], key: str) -> str:
    return "-" if of[key] is None else f"{of[key]:.3f}"


def _table(rows: Iterator[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in HEADS)
    body = "".join("<tr>" + "".join(f"<td>{escapes.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
