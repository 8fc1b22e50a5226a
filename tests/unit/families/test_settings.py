from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import Problems
from shardforge.families.settings import Settings


def of(**told: Any) -> Settings:
    return Settings(told, Path("config.json"))


def problems(settings: Settings) -> list[str]:
    try:
        settings.settle()
    except Problems as found:
        return [problem.what for problem in found.problems]
    return []


def test_a_field_that_nobody_asks_for_is_a_problem_that_names_it():
    settings = of(asked=1, clip_qkv=8.0)
    settings.get("asked")
    assert problems(settings) == ["clip_qkv=8.0 is a field that is not supported"]


@pytest.mark.parametrize("off", [None, False, 0, 0.0, "", [], {}])
def test_a_field_that_is_switched_off_need_not_be_asked_for(off):
    assert problems(of(clip_qkv=off)) == []


@pytest.mark.parametrize("found", [False, None, 0, "no"])
def test_attention_that_is_not_causal_is_refused_though_it_looks_switched_off(found):
    assert problems(of(is_causal=found)) == [f"is_causal={found!r} is not supported, only True"]


def test_attention_that_is_causal_may_be_said_so():
    assert problems(of(is_causal=True)) == []


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop", "embd_pdrop", "dropout", "router_z_loss_coef"])
def test_what_counts_in_training_alone_is_told(name):
    settings = of(**{name: 0.1})
    settings.settle()
    assert settings.notes == [f"{name}=0.1: it counts in training alone, where a recipe says its own"]


@pytest.mark.parametrize("name", ["summary_first_dropout", "classifier_dropout"])
def test_dropout_of_what_is_no_language_model_is_not_told(name):
    settings = of(**{name: 0.1})
    settings.settle()
    assert settings.notes == []


def test_no_dropout_is_not_told():
    settings = of(attention_dropout=0.0)
    settings.settle()
    assert settings.notes == []


@pytest.mark.parametrize(
    "name",
    ["architectures", "torch_dtype", "bos_token_id", "suppress_tokens", "attention_dropout", "resid_pdrop", "top_p"],
)
def test_a_field_that_no_model_computes_by_may_be_set(name):
    assert problems(of(**{name: "anything"})) == []


@pytest.mark.parametrize(
    "name",
    ["attention_bias", "rope_theta", "token_id_scale", "dropout_free_scale", "top_pool", "num_experts_per_token"],
)
def test_a_field_whose_name_is_only_like_those_is_a_problem(name):
    assert len(problems(of(**{name: True}))) == 1


def test_a_long_value_is_told_in_short():
    (told,) = problems(of(scales=list(range(1000))))
    assert len(told) < 120


@pytest.mark.parametrize(
    ("found", "default"), [("yes", True), (1, True), (True, 1), ("2", 2), (2, "two"), ({}, []), ([1], {}), ([2], 2.0)]
)
def test_a_value_of_another_type_than_the_default_is_a_problem(found, default):
    settings = of(field=found)
    assert settings.get("field", default) == default
    assert problems(settings) == [f"field={found!r} should be of the type of {default!r}"]


@pytest.mark.parametrize(("found", "default"), [(False, True), (2, 1.0), (2.0, 1), ("a", "b"), ([], [1]), ({}, {1: 2})])
def test_a_value_of_the_type_of_the_default_is_taken(found, default):
    assert of(field=found).get("field", default) == found


def test_null_is_told_from_a_field_that_is_not_there():
    assert of(window=None).given("window", 4096) is None and of().given("window", 4096) == 4096


@pytest.mark.parametrize("found", [None, 0, -1, 2.0, "2", True, 10**12])
def test_what_has_to_be_a_positive_integer_is_a_problem_otherwise(found):
    settings = of(hidden_size=found)
    assert settings.need("hidden_size") == 1 and len(problems(settings)) == 1


def test_all_problems_are_told_at_once():
    settings = of(a=1, b=2)
    settings.only("a", 0)
    settings.unknown(["b"], "why")
    settings.need("c")
    assert len(problems(settings)) == 3
