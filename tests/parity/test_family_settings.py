"""Every field of every config.json means to us what it means to transformers: given, left out, null, or changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import ForgeError
from shardforge.families.huggingface import family_of
from shardforge.families.section import apart, whole
from shardforge.families.settings import SILENT, Settings
from tests.parity.compare import quiet
from tests.parity.test_families import CASES

transformers = pytest.importorskip("transformers", reason="the transformers package is the reference")

KEPT = re.compile("|".join((*SILENT, "architectures", "model_type", "quantization_config", "experts_implementation")))
IDLE = {
    "use_sliding_window": "without a window there is nothing to use",
    "sliding_window": "counts where it is used",
    "max_window_layers": "counts where windows are used and layer_types are not told",
    "_?sliding_window_pattern": "counts where layer_types are not told",
    "(moe_)?intermediate_size": "counts where a layer has experts, or has none",
    "no_rope_layer_interval": "counts where no_rope_layers are not told",
    "decoder_sparse_step": "counts where mlp_only_layers do not say it",
    "first_k_dense_replace": "counts where a layer has experts",
    "n_group|topk_group": "counts where experts are chosen by group",
    "(qk_)?head_dim": "follows from qk_rope_head_dim in latent attention",
    "num_key_value_heads": "follows from num_attention_heads in latent attention",
}
"""Patterns of fields that some models have and do not compute by."""
IDLE_FIELD = re.compile("|".join(IDLE))


def read(told: Mapping[str, Any]) -> dict[str, Any]:
    """The section that a config.json describes, as a source reads it."""
    settings = Settings(told, Path("config.json"))
    section = family_of(settings).model(settings)
    settings.settle()
    return whole(section, "config.json")


def theirs(told: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with everything that transformers takes where it is silent."""
    with quiet():
        config = transformers.CONFIG_MAPPING[told["model_type"]].from_dict(dict(told))
        return json.loads(config.to_json_string(use_diff=False)) | {"architectures": told["architectures"]}


def fields(name: str) -> tuple[dict[str, Any], list[str]]:
    """The config.json of a case, and the fields in it by which models may compute."""
    with quiet():
        config = CASES[name].config()
        architecture = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
        told = json.loads(config.to_json_string()) | {"architectures": [architecture]}
    return told, [field for field in told if not KEPT.fullmatch(field)]


def misread(told: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What we take otherwise than transformers; nothing where one of the two refuses to read it."""
    try:
        full = theirs(told)
    except Exception:
        return []
    try:
        mine = read(told)
    except ForgeError:
        return []
    return apart(mine, read(full))


def wrong(told: dict[str, dict[str, Any]]) -> dict[str, list[tuple[str, Any, Any]]]:
    """By field, what is misread where that field is changed as `told` has it."""
    return {field: found for field, settings in told.items() if (found := misread(settings))}


@pytest.mark.parametrize("name", CASES)
def test_a_field_that_is_left_out_means_what_transformers_takes_for_it(name):
    told, known = fields(name)
    # of latent attention the first does not count, and the second speaks of modules that transformers does not build
    latent = ("num_key_value_heads", "num_nextn_predict_layers") if "kv_lora_rank" in told else ()
    short = {field: {key: value for key, value in told.items() if key != field} for field in known}
    assert not wrong({field: settings for field, settings in short.items() if field not in latent})


@pytest.mark.parametrize("name", CASES)
def test_a_field_that_is_null_means_what_transformers_takes_for_it(name):
    told, known = fields(name)
    assert not wrong({field: told | {field: None} for field in known})


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 7
    if isinstance(value, str):
        return "relu" if value != "relu" else "silu"
    return {"other": 7} if isinstance(value, dict) else 7


@pytest.mark.parametrize("name", CASES)
def test_a_field_that_changes_is_refused_or_changes_the_model(name):
    told, known = fields(name)
    before, silent = read(told), []
    for field in known:
        try:
            after = read(told | {field: other(told[field])})
        except ForgeError:
            continue
        if not apart(before, after):
            silent.append(field)
    assert not [field for field in silent if not IDLE_FIELD.fullmatch(field)]


LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
PAIRS = {
    f"{one} and {two}": {"rope_scaling": first, "rope_parameters": second}
    for one, first in (("none", None), ("empty", {}), ("linear", LINEAR), ("yarn", YARN))
    for two, second in (
        ("none", None),
        ("plain", {"rope_type": "default"}),
        ("linear", LINEAR),
        ("faster linear", LINEAR | {"rope_theta": 123.0}),
        ("yarn", YARN),
    )
}
"""What is told of positions in the words before transformers 5, and in its own."""


@pytest.mark.parametrize("name", CASES)
def test_positions_told_in_both_words_are_those_of_transformers_or_refused(name):
    told, _ = fields(name)
    bare = {key: value for key, value in told.items() if key not in ("rope_parameters", "rope_scaling")}
    assert not wrong({pair: bare | both for pair, both in PAIRS.items()})


NONSENSE = (
    "x",
    [1],
    [[]],
    {"a": 1},
    {"rope_type": [1]},
    {"rope_type": "yarn", "factor": "x"},
    -1,
    0,
    10**12,
    True,
    1.5,
)


def architectures() -> dict[str, str]:
    """The first case of every architecture."""
    named = {fields(name)[0]["architectures"][0]: name for name in reversed(CASES)}
    return dict(sorted(named.items()))


@pytest.mark.parametrize("name", architectures().values(), ids=architectures())
def test_nonsense_in_a_field_is_refused_or_read_and_never_a_crash(name):
    told, known = fields(name)
    for field in (*known, "rope_scaling", "layer_types", "architectures"):
        for nonsense in NONSENSE:
            with suppress(ForgeError):
                read(told | {field: nonsense})
