from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shardforge.recipe.load import from_mapping, load
from shardforge.recipe.provenance import ABSENT, content_hash, differences, dump, inline, leaves, model_hash, plain
from shardforge.recipe.schema import Recipe
from tests.unit.recipe.stock import TEXT, stocked

WORDS = st.text(max_size=30).filter(lambda text: "${" not in text)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
NORMS = st.one_of(st.just("none"), st.builds(lambda eps: {"kind": "rmsnorm", "eps": eps}, POSITIVE))
BLOCKS = st.dictionaries(
    st.from_regex(r"[a-z0-9_\-:#' ]{1,8}", fullmatch=True).filter(
        lambda name: name == name.strip() and " x " not in name
    ),
    st.builds(
        lambda heads, gain, norms: {
            "mixer": {"kind": "gqa", "heads": heads, "gain": gain, "norms": norms},
            "ffn": {"kind": "mlp", "inner": 2, "bias": True},
        },
        st.integers(1, 12),
        st.one_of(st.just("auto"), POSITIVE),
        st.lists(NORMS, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def recipe_of(**changes: Any) -> Recipe:
    return from_mapping({"name": "x", **yaml.safe_load(TEXT), **changes}).recipe


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    blocks = draw(BLOCKS)
    base = yaml.safe_load(TEXT)
    return recipe_of(
        name=draw(WORDS),
        run_dir=draw(st.none() | WORDS),
        model={**base["model"], "blocks": blocks, "stack": list(blocks)},
        observe=draw(st.lists(st.builds(lambda note: {"kind": "board", "note": note}, WORDS), max_size=2)),
        optim={"kind": "adamw", "groups": draw(st.lists(WORDS, max_size=3))},
        schedule={"kind": "constant", "lr": draw(POSITIVE)},
    )


@settings(max_examples=40)
@given(recipe=recipes())
def test_a_dumped_recipe_loads_back_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    assert load(path).recipe == recipe


@settings(max_examples=40)
@given(recipe=recipes())
def test_a_dump_with_remarks_loads_back_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "remarks.yaml"
    path.write_text(dump(recipe, comment=lambda leaf: f"from\n{leaf} # 'here'"), encoding="utf-8")
    assert load(path).recipe == recipe


@settings(max_examples=40)
@given(recipes())
def test_leaves_are_what_origins_know(recipe: Recipe):
    assert set(leaves(plain(recipe))) == set(from_mapping(plain(recipe)).origins)


def test_plain_data_names_the_kind_first():
    assert next(iter(plain(recipe_of().model.blocks["dense"].mixer))) == "kind"


def test_plain_data_holds_only_what_yaml_knows():
    assert yaml.safe_load(yaml.safe_dump(plain(recipe_of()))) == plain(recipe_of())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-20, "1.0e-20"),
        (1.0, "1.0"),
        (None, "null"),
        (True, "true"),
        ("yes", "'yes'"),
        ("5", "'5'"),
        ("a, b", "'a, b'"),
        ("a\nb", '"a\\nb"'),
        ("\x85", '"\\N"'),
        ("", "''"),
        ([1, "x"], "[1, x]"),
        ({}, "{}"),
    ],
)
def test_values_stand_on_one_line(value: Any, text: str):
    assert inline(value) == text


def test_remarks_stand_in_one_column():
    lines = dump(recipe_of(), comment=lambda leaf: leaf).splitlines()
    assert {line.index("#") for line in lines if "#" in line} == {max(line.find("  # ") for line in lines) + 2}


def test_hash_does_not_see_order_bases_or_comments(tmp_path: Path):
    sections = TEXT.splitlines(keepends=True)
    (tmp_path / "whole.yaml").write_text("name: x\n" + TEXT)
    (tmp_path / "low.yaml").write_text("".join(sections[:6]))
    (tmp_path / "high.yaml").write_text("base: low.yaml  # the model\n" + "".join(reversed(sections[8:])) + "name: x\n"
                                        + "".join(sections[6:8]))  # fmt: skip
    assert content_hash(load(tmp_path / "whole.yaml").recipe) == content_hash(load(tmp_path / "high.yaml").recipe)


def test_hash_does_not_see_the_order_of_names():
    model = yaml.safe_load(TEXT)["model"]
    one, two = model["blocks"]["dense"], {**model["blocks"]["dense"], "ffn": {"kind": "mlp", "inner": 3}}
    orders = ({"one": one, "two": two}, {"two": two, "one": one})
    assert (
        len({content_hash(recipe_of(model={**model, "stack": ["one", "two"], "blocks": each})) for each in orders}) == 1
    )


def test_hash_sees_every_value():
    assert len({content_hash(recipe_of()), content_hash(recipe_of(seed=1)), content_hash(recipe_of(name="y"))}) == 3


def test_hash_is_the_same_in_another_process():
    code = "from tests.unit.recipe.test_provenance import *\nwith stocked(): print(content_hash(recipe_of()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3]
    )
    with stocked():
        assert done.stdout.strip() == content_hash(recipe_of())


def test_model_hash_does_not_see_the_core_or_the_rest():
    model = yaml.safe_load(TEXT)["model"]
    assert model_hash(recipe_of(seed=1, model={**model, "core": "eager"})) == model_hash(recipe_of())


def test_model_hash_sees_the_model():
    model = yaml.safe_load(TEXT)["model"]
    assert model_hash(recipe_of(model={**model, "vocab": 65})) != model_hash(recipe_of())


def test_equal_recipes_have_no_differences():
    assert differences(recipe_of(), recipe_of()) == []


def test_differences_name_the_field_and_both_values():
    left, right = recipe_of(), recipe_of(seed=3, observe=["board"])
    assert differences(left, right) == [
        ("seed", 0, 3),
        ("observe", [], ABSENT),
        ("observe.0.kind", ABSENT, "board"),
        ("observe.0.note", ABSENT, ""),
    ]
