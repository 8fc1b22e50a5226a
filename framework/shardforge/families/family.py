"""A family of published models: how its settings become a recipe's model section, and its names become ours."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import shardforge.families.kinds
from shardforge.families.settings import Settings
from shardforge.families.table import Row

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Family:
    """One file of `families/kinds` is one family: its `FAMILY`."""

    architectures: tuple[str, ...]  # as config.json names them
    model: Callable[[Settings], dict[str, Any]]
    table: tuple[Row, ...]
    tied: str  # the name that a file may give the head's copy of the embedding, when they are tied
    spare: tuple[str, ...] = ()  # regular expressions of tensors that hold nothing learned
    optional: str = ""  # what some files leave out before every name


def families() -> dict[str, Family]:
    """Architecture -> its family, sorted."""
    found: dict[str, Family] = {}
    package = shardforge.families.kinds
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.architectures, family)
    return dict(sorted(found.items()))


def rope(settings: Settings) -> dict[str, Any]:
    """The rotary position, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    told = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    base = told.pop("rope_theta", None) or settings.get("rope_theta", 10000.0)
    fraction = told.pop("partial_rotary_factor", None) or settings.get("partial_rotary_factor", 1.0)
    position: dict[str, Any] = {"kind": "rope", "base": float(base), "fraction": float(fraction)}
    kind = told.pop("rope_type", None) or told.pop("type", None) or "default"
    told.pop("type", None)
    if kind == "default":
        return position
    if kind not in SCALINGS:
        settings.wrong(f"rope_type={kind!r} is not supported, only {', '.join(['default', *SCALINGS])}")
        return position
    names = SCALINGS[kind]
    if "original_length" in names.values():
        told.setdefault("original_max_position_embeddings", settings.get("max_position_embeddings"))
    for key in told.keys() - names.keys():
        settings.wrong(f"{key} is not a field of rope_type={kind!r} that is supported")
    given = {ours: told[theirs] for theirs, ours in names.items() if told.get(theirs) is not None}
    return position | {"scaling": {"kind": kind} | given}


def numbered(settings: Settings, blocks: Mapping[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The blocks that `names`, one a layer, use, and the stack that says so in the fewest words."""
    if not names:
        settings.wrong("there are no layers")
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    stack = [name if times == 1 else f"{name} x {times}" for name, times in runs]
    return {"blocks": {name: blocks[name] for name in dict.fromkeys(names)}, "stack": stack}


def windows(settings: Settings, layers: int, windowed: bool) -> list[int | None]:
    """Keys that each layer sees at most, None for all of its document; `windowed` where the settings have no say."""
    size, kinds = settings.get("sliding_window"), settings.get("layer_types")
    if kinds is not None:
        known = {"full_attention": None, "sliding_attention": size}
        for kind in sorted(set(kinds) - known.keys()):
            settings.wrong(f"layer_types has {kind!r}, only {' and '.join(known)} are supported")
        if len(kinds) != layers:
            settings.wrong(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
        return [known.get(kind) for kind in kinds]
    if not settings.get("use_sliding_window", windowed):
        return [None] * layers
    first = settings.get("max_window_layers", 0)
    return [size if layer >= first else None for layer in range(layers)]


def masked(
    settings: Settings, mixer: dict[str, Any], block: dict[str, Any], layers: int, windowed: bool
) -> dict[str, Any]:
    """Blocks and stack of layers that differ in their window alone; `mixer` completes `block`."""
    sizes = windows(settings, layers, windowed)
    names = ["dense" if size is None else "near" for size in sizes]
    size = next((size for size in sizes if size is not None), None)
    near = mixer | {"mask": {"kind": "window", "size": size}}
    return numbered(settings, {"dense": {"mixer": mixer, **block}, "near": {"mixer": near, **block}}, names)


SCALINGS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor", "original_max_position_embeddings": "original_length"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
"""Kind of scaling, the same word on both sides -> their field -> ours."""
