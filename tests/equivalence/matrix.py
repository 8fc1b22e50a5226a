"""What is combined with what: factors of a step, which values go together, and a sample that has every pair."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from shardforge.core.layout import Layout
from tests.equivalence.mixtures import DEEPSEEK, OSS
from tests.tiny import GLU, GQA, LENGTH, SEQUENCES

Row = dict[str, str]

MODELS: Mapping[str, dict[str, Any]] = {
    "gqa-dropout": {
        "mixer": GQA | {"kv_heads": 2, "qk_norm": "rmsnorm", "bias": "all"},
        "residual": {"kind": "pre", "dropout": 0.3},
        "model": {"dropout": 0.2, "stack": ["one x 4"]},
    },
    "tied-softcap": {"model": {"head": {"kind": "softcap", "head": "tied"}, "stack": ["one x 4"]}},
    "near-and-far": {
        "model": {
            "blocks": {
                "near": {"mixer": GQA | {"mask": {"kind": "window", "size": 4}}, "ffn": GLU},
                "far": {"mixer": GQA | {"position": "nope"}, "ffn": {"kind": "mlp", "inner": 32}},
            },
            "stack": ["near x 2", "far", "near"],
        }
    },
    "moe-deepseek": DEEPSEEK
    | {
        "objective": {"kind": "next_token", "z_loss": 0.1},
        "model": {"stack": ["one x 4"], "mtp": {"block": "one", "weight": 0.5}},
    },
    "moe-oss": OSS | {"model": OSS["model"] | {"stack": ["one x 4"]}},
}

DENSE = ["one", "dp2", "tp2", "cp2", "pp2", "dp4", "rep2-dp2", "tp4", "cp4", "pp4"]
DENSE += ["dp2-tp2", "dp2-cp2", "cp2-tp2", "pp2-dp2", "pp2-tp2", "pp2-cp2", "rep2-tp2", "rep2-cp2", "pp2-rep2"]
SPARSE = ["dp2-ep2", "tp2-ep2", "cp2-ep2", "dp4-ep2", "dp4-ep4", "dp2-tp2-ep2", "dp2-tp2-ep4", "rep2-dp2-ep2"]
SPARSE += ["dp2-etp2", "tp2-etp2", "dp2-tp2-ep2-etp2", "pp2-dp2-ep2", "pp2-tp2-ep2", "cp2-tp2-ep2-etp2"]
LARGE = ["pp2-dp2-tp2", "pp2-cp2-tp2-ep2", "rep2-dp2-tp2-ep4", "pp2-dp2-cp2-ep4", "pp4-dp2-ep2", "dp2-cp2-tp2-ep2-etp2"]

FACTORS: Mapping[str, list[str]] = {
    "layout": DENSE + SPARSE,
    "model": list(MODELS),
    "schedule": ["none", "gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev"],
    "context": ["auto", "gather", "ring", "ulysses"],
    "dispatch": ["auto", "gather", "exchange", "two_hop"],
    "zero": ["1", "2", "3"],
    "recompute": ["none", "full", "selective"],
    "micro_batch": ["whole", "1", "2"],
    "data": ["packed", "padded"],
    "overlap": ["false", "true"],
    "offload": ["none", "optimizer", "activations"],
    "order": [Layout().order, "tp-rep-pp-cp-dp"],
}
STILL = {"context": "auto", "dispatch": "auto", "overlap": "false", "schedule": "none"}
"""What a factor is where its axis has one rank and it would change nothing."""
SPLIT_BACKWARD = ("zero_bubble", "zbv", "dualpipev")


def fits(row: Row) -> bool:
    """Whether the values of a row, or of a part of one, can stand together."""
    layout = Layout.parse(row.get("layout", "one")) if "layout" in row else None
    schedule, zero, recompute = row.get("schedule"), row.get("zero"), row.get("recompute")
    if layout is not None:
        idle = {"context": layout.cp == 1, "dispatch": layout.ep * layout.etp == 1, "overlap": layout.tp == 1}
        idle["schedule"] = layout.pp == 1
        if any(row.get(name, still) != still for name, still in STILL.items() if idle[name]):
            return False
        if layout.pp > 1 and schedule == "none":
            return False
        if layout.ep * layout.etp > 1 and not row.get("model", "moe").startswith("moe"):
            return False
        if layout.pp == 4 and schedule in ("interleaved", "zero_bubble", "zbv", "dualpipev"):
            return False  # the tiny models have 4 layers
        if layout.pp > 1 and row.get("micro_batch") == "whole":
            return False
    if recompute == "selective" and row.get("offload") == "activations":
        return False
    if schedule in SPLIT_BACKWARD and (zero == "3" or recompute not in (None, "none") or row.get("overlap") == "true"):
        return False
    if schedule not in (None, "none", "gpipe", "1f1b") and row.get("micro_batch") == "2":
        return False  # too few micro-batches of a data rank's share
    if not row.get("model", "").startswith("moe") and row.get("dispatch", "auto") != "auto":
        return False
    return not (row.get("context") == "ulysses" and layout is not None and layout.cp * layout.tp > 4)


@functools.cache
def possible() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Every pair of values of two factors that some row can have together."""
    return [
        ((a, x), (b, y))
        for a, b in itertools.combinations(FACTORS, 2)
        for x in FACTORS[a]
        for y in FACTORS[b]
        if fits({a: x, b: y}) and _completes({a: x, b: y})
    ]


@functools.cache
def pairwise(seed: int = 0) -> list[Row]:
    """Rows such that every pair of values that fits together stands in one of them; greedy, the same each time."""
    chance, names = random.Random(seed), list(FACTORS)
    open_pairs = set(possible())
    rows: list[Row] = []
    while open_pairs:
        (a, x), (b, y) = min(open_pairs)
        row: Row = {a: x, b: y}
        for name in sorted(names, key=lambda n: -len(FACTORS[n])):
            if name in row:
                continue
            options = [v for v in FACTORS[name] if fits(row | {name: v}) and _completes(row | {name: v})]
            chance.shuffle(options)
            row[name] = max(options, key=lambda v: len(_pairs(row | {name: v}) & open_pairs))
        open_pairs -= _pairs(row)
        rows.append({name: row[name] for name in names})
    return rows


def large() -> list[Row]:
    """Products of many axes at once, on eight ranks, each with the next of the values that fit."""
    rows = []
    for number, layout in enumerate(LARGE):
        row: Row = {"layout": layout}
        for name in list(FACTORS)[1:]:
            options = [v for v in FACTORS[name] if fits(row | {name: v}) and _completes(row | {name: v})]
            row[name] = options[number % len(options)]
        rows.append(row)
    return rows


def product() -> Iterator[Row]:
    """Every row that fits."""
    names = list(FACTORS)

    def grow(row: Row) -> Iterator[Row]:
        if len(row) == len(names):
            yield row
            return
        name = names[len(row)]
        for value in FACTORS[name]:
            if fits(row | {name: value}):
                yield from grow(row | {name: value})

    return grow({})


def changes(row: Row) -> dict[str, Any]:
    """A row as changes to the tiny recipe."""
    engine: dict[str, Any] = {"kind": "native", "zero": int(row["zero"]), "recompute": row["recompute"]}
    engine |= {"context": row["context"], "dispatch": row["dispatch"], "overlap": row["overlap"] == "true"}
    engine["offload"] = [] if row["offload"] == "none" else [row["offload"]]
    if row["schedule"] != "none":
        engine["schedule"] = row["schedule"]
    train: dict[str, Any] = {"steps": 2, "sequences": SEQUENCES, "seq_len": LENGTH}
    if row["micro_batch"] != "whole":
        train["micro_batch"] = int(row["micro_batch"])
    return MODELS[row["model"]] | {"engine": engine, "train": train}


def layout(row: Row) -> Layout:
    return replace(Layout.parse(row["layout"]), order=row["order"])


def title(row: Row) -> str:
    """Short and unique: the values that are not at rest."""
    rest = {
        "zero": "3",
        "recompute": "none",
        "micro_batch": "whole",
        "data": "packed",
        "offload": "none",
        "order": Layout().order,
    } | STILL
    return " ".join(f"{name}={value}" for name, value in row.items() if rest.get(name) != value)


def _pairs(row: Row) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    names = [name for name in FACTORS if name in row]
    return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(names, 2)}


def _completes(row: Row) -> bool:
    """Whether some full row contains this part."""
    missing = [name for name in FACTORS if name not in row]
    if not missing:
        return fits(row)
    name = min(missing, key=lambda n: sum(fits(row | {n: v}) for v in FACTORS[n]))
    return any(fits(row | {name: v}) and _completes(row | {name: v}) for v in FACTORS[name])
