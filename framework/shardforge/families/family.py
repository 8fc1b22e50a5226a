"""A family of published models: how its settings become a recipe's model section, and its names become ours."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import shardforge.families.kinds
from shardforge.families.linked import Tensors
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
    config: Callable[[dict[str, Any]], dict[str, Any]]  # a whole model section -> config.json; see families.publish
    table: Callable[[dict[str, Any]], Sequence[Row]]  # of a whole model section
    tied: str  # the name that a file may give the head's copy of the embedding, when they are tied
    spare: tuple[str, ...] = ()  # regular expressions of tensors that hold nothing learned
    optional: str = ""  # what some files leave out before every name
    decoded: Callable[[Tensors, Settings], Tensors] | None = None  # reads quantised weights; None: there are none
    present: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] | None = None
    """A whole model section without the modules of which a file with these names holds nothing; None: as it is."""
    held: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    """A whole model section as the weights that `table` writes mean it; None: as it is."""


def families() -> dict[str, Family]:
    """Architecture -> its family, sorted."""
    found: dict[str, Family] = {}
    package = shardforge.families.kinds
    for module in pkgutil.iter_modules(package.__path__):
        family: Family = importlib.import_module(f"{package.__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.architectures, family)
    return dict(sorted(found.items()))


def rope(settings: Settings, base: float = 10000.0) -> dict[str, Any]:
    """The rotary position, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

    `base` is the architecture's own, where the settings have no say. Where both are told they must say the same:
    transformers before 5 knows the second alone, and 5.23 takes it before the first."""
    told = [settings.get("rope_parameters", {}), settings.get("rope_scaling", {})]
    first, *more = [_position(settings, each, base) for each in told if each] or [_position(settings, {}, base)]
    for other in more:
        if other != first:
            differ = [key for key in first.keys() | other.keys() if first.get(key) != other.get(key)]
            what = f"rope_parameters and rope_scaling are both set and differ in {', '.join(sorted(differ))}"
            settings.wrong(f"{what}: programs disagree on which one counts")
    return first


def _position(settings: Settings, given: Mapping[str, Any], base: float) -> dict[str, Any]:
    told, position = dict(given), dict[str, Any](kind="rope")
    for ours, theirs, usual in (("base", "rope_theta", base), ("fraction", "partial_rotary_factor", 1.0)):
        alone = settings.get(theirs, usual)
        found = told.pop(theirs, None) or alone
        if type(found) not in (int, float) or found <= 0:
            settings.wrong(f"{theirs}={found!r} of the positions is no positive number")
            found = usual
        position[ours] = float(found)
    kinds = [told.pop(word, None) for word in ("rope_type", "type")]
    kind = str(kinds[0] or kinds[1] or "default")
    if kind != "default" and kind not in SCALINGS:
        settings.wrong(f"rope_type={kind!r} is not supported, only {', '.join(['default', *SCALINGS])}")
        return position
    names = SCALINGS.get(kind, {})
    longest = settings.get("max_position_embeddings")
    if "original_length" in names.values() and told.get("original_max_position_embeddings") is None:
        told["original_max_position_embeddings"] = longest
    if kind == "dynamic" and told["original_max_position_embeddings"] != longest:
        what = f"original_max_position_embeddings={told['original_max_position_embeddings']} of rope_type='dynamic'"
        settings.wrong(f"{what} is not max_position_embeddings={longest}, which is what counts there")
    for key in sorted(told.keys() - names.keys()):
        settings.wrong(f"{key} is not a field of rope_type={kind!r} that is supported")
    said = {ours: told[theirs] for theirs, ours in names.items() if told.get(theirs) is not None}
    return position | {"scaling": {"kind": kind} | said} if names else position


def rope_config(position: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope` reads of config.json, from a rotary position: in the words that transformers before 5 knows too."""
    found: dict[str, Any] = {"rope_theta": position["base"]}
    if position["fraction"] != 1.0:
        found["partial_rotary_factor"] = position["fraction"]
    scaling = position["scaling"]
    if scaling is not None:
        names = SCALINGS[scaling["kind"]]
        given = {theirs: scaling[ours] for theirs, ours in names.items() if scaling[ours] is not None}
        found["rope_scaling"] = {"rope_type": scaling["kind"], **given}
        if scaling["kind"] == "dynamic":
            found["max_position_embeddings"] = scaling["original_length"]
    return found


def numbered(settings: Settings, blocks: Mapping[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """The blocks that `names`, one a layer, use, and the stack that says so in the fewest words."""
    if not names:
        settings.wrong("there are no layers")
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    stack = [name if times == 1 else f"{name} x {times}" for name, times in runs]
    return {"blocks": {name: blocks[name] for name in dict.fromkeys(names)}, "stack": stack}


def windows(settings: Settings, layers: int, size: int | None, otherwise: Sequence[int | None]) -> list[int | None]:
    """Keys that each layer sees at most, None for all of its document: `size` where layer_types say so, and
    `otherwise` where there are no layer_types."""
    kinds = [str(kind) for kind in settings.get("layer_types", [])]
    if not kinds:
        return list(otherwise)
    known = {"full_attention": None, "sliding_attention": size}
    for kind in sorted(set(kinds) - known.keys()):
        settings.wrong(f"layer_types has {kind!r}, only {' and '.join(known)} are supported")
    if len(kinds) != layers:
        settings.wrong(f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}")
    if "sliding_attention" in kinds and size is None:
        settings.wrong("layer_types has 'sliding_attention', and no sliding_window is set")
    return [known.get(kind) for kind in kinds]


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
