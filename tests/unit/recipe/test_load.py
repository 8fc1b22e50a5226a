from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import shardforge
from shardforge.core.errors import ForgeError, Problems, RecipeError
from shardforge.core.layout import Layout
from shardforge.recipe import load as module
from shardforge.recipe.load import STAND_INS, find, from_mapping, load, load_model, names, shipped
from shardforge.recipe.schema import Recipe
from tests.unit.recipe.stock import TEXT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with one shipped recipe called first elsewhere."""
    (tmp_path / "shipped" / "runs").mkdir(parents=True)
    (tmp_path / "shipped" / "models").mkdir()
    (tmp_path / "shipped" / "runs" / "first.yaml").write_text(TEXT)
    (tmp_path / "shipped" / "runs" / "twin.yaml").write_text(TEXT)
    (tmp_path / "shipped" / "models" / "twin.yaml").write_text(TEXT)
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(module, "shipped", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_a_path_is_taken_as_it_is(folder: Path):
    Path("mine.yml").write_text(TEXT)
    assert find("mine.yml") == Path("mine.yml")


def test_a_run_directory_stands_for_its_recipe(folder: Path):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(TEXT)
    assert find("run") == Path("run/recipe.yaml")


@pytest.mark.parametrize("name", ["first", "first.yaml", "runs/first", "recipes/runs/first.yaml"])
def test_a_shipped_recipe_is_found_by_name(folder: Path, name: str):
    assert find(name) == folder.parent / "shipped" / "runs" / "first.yaml"


def test_recipes_of_the_working_directory_come_first(folder: Path):
    Path("recipes/own").mkdir(parents=True)
    Path("recipes/own/first.yaml").write_text(TEXT)
    assert find("first") == Path("recipes/own/first.yaml")


def test_an_unknown_name_is_answered_with_the_nearest(folder: Path):
    with pytest.raises(RecipeError) as caught:
        find("frist")
    assert str(caught.value) == ("there is no recipe 'frist', as a file or by name\n    fix: did you mean 'first'?")


def test_a_name_of_two_recipes_asks_which(folder: Path):
    with pytest.raises(RecipeError) as caught:
        find("twin")
    assert str(caught.value) == "2 recipes are called 'twin'\n    fix: write models/twin or runs/twin"


def test_names_of_an_empty_place_are_none(tmp_path: Path):
    assert names(tmp_path / "nowhere") == {}


def test_a_base_may_be_a_shipped_name(folder: Path):
    Path("x.yaml").write_text("base: first\nseed: 3\n")
    assert load("x.yaml").recipe.train.steps == 10


def test_the_working_directory_does_not_change_what_a_base_means(folder: Path):
    Path("recipes").mkdir()
    Path("recipes/first.yaml").write_text("seed: 5\n")
    Path("deep").mkdir()
    Path("deep/x.yaml").write_text("base: first\n")
    assert load("deep/x.yaml").recipe.seed == 0


def test_a_model_alone_is_a_recipe_for_those_who_ask_about_models(folder: Path):
    Path("model.yaml").write_text(TEXT.partition("data:")[0])
    loaded = load_model("model.yaml", ["model.vocab=128"])
    assert (loaded.recipe.name, loaded.recipe.model.vocab) == ("model", 128)
    assert {path.partition(".")[0] for path, origin in loaded.origins.items() if str(origin) == "stand-in"} == set(
        STAND_INS
    )


def test_a_whole_recipe_is_the_same_with_and_without_stand_ins(folder: Path):
    assert load_model("first").recipe == load("first").recipe


def test_a_section_that_is_there_gets_no_stand_in(folder: Path):
    Path("model.yaml").write_text(TEXT.replace("steps: 10, ", ""))
    with pytest.raises(Problems, match="train: field 'steps' is missing"):
        load_model("model.yaml")


def test_a_clone_ships_its_recipes_folder():
    assert shipped() == Path(shardforge.__file__).parents[2] / "recipes"


def test_an_installed_package_ships_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "_recipes").mkdir()
    monkeypatch.setattr(shardforge, "__file__", str(tmp_path / "__init__.py"))
    assert shipped() == tmp_path / "_recipes"


def test_a_run_without_name_is_called_like_its_file(folder: Path):
    loaded = load("first")
    assert (loaded.recipe.name, str(loaded.origins["name"])) == ("first", "default: file name")


def test_a_given_name_stays(folder: Path):
    Path("recipe.yaml").write_text("name: mine\n" + TEXT)
    assert load("recipe.yaml").recipe.name == "mine"


def test_values_know_where_they_were_written(folder: Path):
    Path("x.yaml").write_text("base: first\ntrain: {steps: 20}\n")
    origins = load("x.yaml", ["seed=4"]).origins
    assert [str(origins[field]) for field in ("train.steps", "seed", "parallel.tp")] == [
        "x.yaml:2:16",
        "--set seed=4",
        "default",
    ]


def test_a_value_of_a_base_knows_the_file_of_the_base(folder: Path):
    Path("low.yaml").write_text(TEXT)
    Path("x.yaml").write_text("base: low.yaml\n")
    assert str(load("x.yaml").origins["train.sequences"]) == "low.yaml:10:31"


def test_later_sets_win(folder: Path):
    assert load("first", ["seed=1", "seed=2"]).recipe.seed == 2


def test_mistakes_of_file_and_sets_are_reported_together(folder: Path):
    Path("x.yaml").write_text("base: first\nseed: x\nseed: 2\n")
    with pytest.raises(Problems) as caught:
        load("x.yaml", ["nonsense", "train.stesp=3"])
    assert sorted(problem.where for problem in caught.value.problems) == [
        "--set nonsense",
        "--set train.stesp=3",
        "x.yaml:2:7",
        "x.yaml:3:1",
    ]


def test_broken_rules_are_reported_with_their_places(folder: Path):
    with pytest.raises(Problems, match=r"first\.yaml:10:31  train\.sequences: 8 sequences"):
        load("first", ["parallel.dp_shard=3"])


def test_a_mapping_may_hold_configs_and_paths(tmp_path: Path):
    mapping = {"name": "x", **yaml.safe_load(TEXT), "parallel": Layout(tp=2), "run_dir": tmp_path}
    recipe = from_mapping(mapping).recipe
    assert (recipe.parallel, recipe.run_dir) == (Layout(tp=2), str(tmp_path))


def test_a_mapping_takes_sets():
    assert from_mapping({"name": "x", **yaml.safe_load(TEXT)}, ["seed=4"]).recipe.seed == 4


def test_a_mapping_needs_a_name():
    with pytest.raises(Problems, match="field 'name' is missing"):
        from_mapping(yaml.safe_load(TEXT))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("gqa"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "heads", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.data())
def test_whatever_stands_in_a_recipe_it_loads_or_says_what_is_wrong(data: st.DataObject):
    mapping = {"name": "x", **yaml.safe_load(TEXT)}
    fields = sorted(
        {".".join(field.split(".")[:depth]) for field in from_mapping(mapping).origins for depth in (1, 2, 5)}
    )
    for field in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=3)):
        *above, last = field.split(".")
        section = mapping
        for key in above:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = data.draw(ANYTHING)
    try:
        assert isinstance(from_mapping(mapping).recipe, Recipe)
    except ForgeError as error:
        assert str(error)
