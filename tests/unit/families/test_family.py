from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardforge.core.errors import Problems
from shardforge.families.family import families, numbered, rope, rope_config, windows
from shardforge.families.section import whole
from shardforge.families.settings import Settings

FACTOR = st.floats(1.0, 64.0)
LENGTH = st.integers(1, 10**6)
OR_NOT = st.none() | st.floats(0.1, 4.0)
SCALINGS = st.one_of(
    st.none(),
    st.fixed_dictionaries({"kind": st.just("linear"), "factor": FACTOR}),
    st.fixed_dictionaries({"kind": st.just("dynamic"), "factor": FACTOR, "original_length": LENGTH}),
    st.fixed_dictionaries(
        {
            "kind": st.just("llama3"),
            "factor": FACTOR,
            "low_freq_factor": st.floats(0.5, 1.0),
            "high_freq_factor": st.floats(2.0, 4.0),
            "original_length": LENGTH,
        }
    ),
    st.fixed_dictionaries(
        {
            "kind": st.just("yarn"),
            "factor": FACTOR,
            "original_length": LENGTH,
            "beta_fast": st.floats(16.0, 64.0),
            "beta_slow": st.floats(0.5, 2.0),
            "truncate": st.booleans(),
            "attention_factor": OR_NOT,
        }
    ),
)


def of(**told: Any) -> Settings:
    return Settings(told, Path("config.json"))


def problems(settings: Settings) -> list[str]:
    try:
        settings.settle()
    except Problems as found:
        return [problem.what for problem in found.problems]
    return []


def complete(position: dict[str, Any]) -> dict[str, Any]:
    """A position with every field that it leaves out."""
    block = {
        "mixer": {"kind": "gqa", "heads": 1, "head_dim": 64, "position": position},
        "ffn": {"kind": "glu", "inner": 1},
    }
    told = whole({"vocab": 2, "hidden": 1, "blocks": {"one": block}, "stack": ["one"]}, "the test")
    return told["blocks"]["one"]["mixer"]["position"]


@given(scaling=SCALINGS, base=st.floats(2.0, 1e7), fraction=st.sampled_from([0.25, 0.5, 1.0]))
def test_a_position_that_is_written_is_read_as_it_was(scaling, base, fraction):
    position = complete({"kind": "rope", "base": base, "fraction": fraction, "scaling": scaling})
    settings = of(**rope_config(position))
    assert complete(rope(settings)) == position and problems(settings) == []


def test_the_words_before_transformers_5_mean_the_same():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16}
    before = of(rope_theta=500.0, rope_scaling={"type": "yarn", **scaling}, partial_rotary_factor=0.5)
    told = {"rope_type": "yarn", "rope_theta": 500.0, "partial_rotary_factor": 0.5, **scaling}
    assert rope(before) == rope(of(rope_parameters=told))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("scaling", "parameters", "field"),
    [
        (YARN, {"rope_type": "default"}, "scaling"),
        (YARN, YARN | {"factor": 8.0}, "scaling"),
        (YARN, YARN | {"rope_theta": 500.0}, "base"),
        ({"rope_type": "default"}, YARN, "scaling"),
    ],
)
def test_two_words_for_positions_that_differ_are_a_problem(scaling, parameters, field):
    settings = of(rope_scaling=scaling, rope_parameters=parameters)
    rope(settings)
    (told,) = problems(settings)
    assert told.startswith(f"rope_parameters and rope_scaling are both set and differ in {field}:")


@pytest.mark.parametrize("scaling", [YARN, {"type": "yarn"} | {k: v for k, v in YARN.items() if k != "rope_type"}, {}])
def test_two_words_for_the_same_positions_are_read(scaling):
    settings = of(rope_theta=500.0, rope_scaling=scaling, rope_parameters=YARN | {"rope_theta": 500.0})
    assert rope(settings) == rope(of(rope_parameters=YARN | {"rope_theta": 500.0})) and not problems(settings)


def test_a_base_that_nobody_tells_is_the_architecture_s():
    assert rope(of(), base=77.0)["base"] == 77.0


def test_the_length_of_the_first_training_is_the_longest_where_nobody_tells():
    settings = of(max_position_embeddings=64, rope_scaling={"rope_type": "llama3", "factor": 8.0})
    assert rope(settings)["scaling"]["original_length"] == 64


@pytest.mark.parametrize("told", ["yarn", [1], 3, True])
def test_positions_that_are_no_mapping_are_a_problem(told):
    settings = of(rope_scaling=told)
    rope(settings)
    assert len(problems(settings)) == 1


@pytest.mark.parametrize("field", ["rope_theta", "partial_rotary_factor"])
def test_a_number_that_is_none_is_a_problem(field):
    settings = of(rope_parameters={"rope_type": "default", field: "many"})
    rope(settings)
    assert problems(settings) == [f"{field}='many' of the positions is no positive number"]


def test_runs_of_one_block_are_written_once():
    made = numbered(of(), {"a": {"x": 1}, "b": {"x": 2}, "c": {}}, ["a", "b", "b", "a"])
    assert made == {"blocks": {"a": {"x": 1}, "b": {"x": 2}}, "stack": ["a", "b x 2", "a"]}


def test_layer_types_say_which_layers_see_less():
    told = of(layer_types=["full_attention", "sliding_attention"])
    assert windows(told, 2, 7, [7, 7]) == [None, 7]


def test_without_layer_types_the_architecture_says_it():
    assert windows(of(), 2, 7, [7, None]) == [7, None]


@pytest.mark.parametrize("kinds", [["full_attention"], ["full_attention", "linear"], [["full_attention"], {}], "full"])
def test_layer_types_that_say_something_else_are_a_problem(kinds):
    settings = of(layer_types=kinds)
    windows(settings, 2, 7, [None, None])
    assert problems(settings)


@pytest.mark.parametrize("architecture", families())
def test_a_family_is_found_by_each_of_its_architectures(architecture):
    assert architecture in families()[architecture].architectures
