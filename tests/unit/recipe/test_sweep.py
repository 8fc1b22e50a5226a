from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from shardforge.core.errors import Problems, RecipeError
from shardforge.recipe.load import load
from shardforge.recipe.sweep import load_sweep
from tests.unit.recipe.stock import TEXT


def write(folder: Path, arms: Any, **shared: Any) -> Path:
    (folder / "shared.yaml").write_text(json.dumps(yaml.safe_load(TEXT) | shared))
    path = folder / "pair.yaml"
    path.write_text(json.dumps({"base": "shared.yaml", "seed": 4, "arms": arms}))
    return path


def test_an_arm_is_the_shared_recipe_with_its_changes(tmp_path):
    arms = load_sweep(write(tmp_path, {"a": None, "b": {"model": {"hidden": 32}}})).arms
    assert [arm.recipe.model.hidden for arm in arms.values()] == [16, 32]
    assert {arm.recipe.seed for arm in arms.values()} == {4}


def test_an_arm_lives_in_a_folder_of_its_name_below_the_sweep(tmp_path):
    made = load_sweep(write(tmp_path, {"a": {}}))
    assert (made.name, made.folder) == ("pair", Path("runs/pair"))
    assert (made.arms["a"].recipe.name, made.arms["a"].recipe.run_dir) == ("a", "runs/pair/a")


def test_a_sweep_has_a_name_and_a_folder_of_its_own(tmp_path):
    path = write(tmp_path, {"a": {}})
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "x", "run_dir": "there"}))
    made = load_sweep(path)
    assert (made.name, made.arms["a"].recipe.run_dir) == ("x", "there/a")


def test_what_is_set_is_set_in_every_arm(tmp_path):
    made = load_sweep(write(tmp_path, {"a": {}, "b": {"seed": 5}}), ["train.steps=7"])
    assert [arm.recipe.train.steps for arm in made.arms.values()] == [7, 7]


def test_a_name_or_a_folder_that_is_set_is_that_of_the_sweep(tmp_path):
    made = load_sweep(write(tmp_path, {"a": {}, "b": {}}), ["name=x", "run_dir=elsewhere"])
    assert made.name == "x" and [arm.recipe.run_dir for arm in made.arms.values()] == ["elsewhere/a", "elsewhere/b"]


def test_the_mistakes_of_all_arms_come_at_once_and_a_shared_one_once(tmp_path):
    arms = {"a": {"model": {"hiden": 1}}, "b": {"train": {"steps": 0}}, "c": {}}
    with pytest.raises(Problems) as caught:
        load_sweep(write(tmp_path, arms, optim={"kind": "adamm"}))
    text = str(caught.value)
    assert "no field 'hiden'" in text and "0 is not at least 1" in text and text.count("'adamm'") == 1


def test_an_origin_points_into_the_file_of_the_sweep(tmp_path):
    made = load_sweep(write(tmp_path, {"a": {"seed": 9}}))
    assert str(made.arms["a"].origins["seed"]).partition(":")[0].endswith("pair.yaml")


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        (None, "expected names, got nothing"),
        ({}, "expected names, got a mapping"),
        ([1], "expected names, got a list"),
        ({"a b": {}}, "an arm is a folder"),
        ({"..": {}}, "an arm is a folder"),
        ({"a": 3}, "expected changes, got int 3"),
        ({"a": {"run_dir": "x"}}, "run_dir follows from the name of the arm"),
    ],
)
def test_arms_that_are_none_say_so(tmp_path, arms, told):
    with pytest.raises((RecipeError, Problems), match=told):
        load_sweep(write(tmp_path, arms))


def test_a_recipe_is_no_sweep(tmp_path):
    write(tmp_path, {})
    with pytest.raises(RecipeError, match="this is no sweep: it has no arms"):
        load_sweep(tmp_path / "shared.yaml")


def test_a_sweep_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"this is a sweep(.|\n)*fix: shardforge sweep"):
        load(write(tmp_path, {"a": {}}))
