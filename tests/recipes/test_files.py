"""Every file of recipes/ can be read, built and found in recipes/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.model.build import build
from shardforge.nn.module import declared
from shardforge.recipe.load import load, load_model, shipped
from shardforge.recipe.sweep import load_sweep

FOLDER = shipped()
CLUSTERS = sorted((FOLDER / "clusters").glob("*.yaml"))
FILES = sorted({*FOLDER.rglob("*.yaml")} - {*CLUSTERS})  # profiles are tested where they are read
MODELS, RUNS, BASES, SWEEPS = (sorted((FOLDER / name).glob("*.yaml")) for name in ("models", "runs", "base", "sweeps"))


def named(files: list[Path]):
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


@named(MODELS)
def test_a_model_builds_and_says_nothing_else(file: Path):
    loaded = load_model(file)
    given = {path.partition(".")[0] for path, origin in loaded.origins.items() if origin.line}
    assert given == {"model"}


@named(RUNS)
def test_a_run_is_a_whole_recipe_that_its_engine_takes(file: Path):
    recipe = load(file).recipe
    model = build(recipe.model, recipe.objective.build())
    recipe.engine.check(recipe, model)
    assert any(declared(model))


@named(SWEEPS)
def test_an_arm_of_a_sweep_builds(file: Path):
    for arm in load_sweep(file).arms.values():
        assert any(declared(build(arm.recipe.model, arm.recipe.objective.build())))


@named(BASES)
def test_a_base_merges_with_a_model(file: Path, tmp_path: Path):
    (tmp_path / "x.yaml").write_text(f"base: [models/llama-7m, {file}]\n")
    assert load_model(tmp_path / "x.yaml").recipe.name == "x"


def test_every_file_is_one_of_these():
    assert {*MODELS, *RUNS, *BASES, *SWEEPS} == set(FILES)


@named([*MODELS, *RUNS, *SWEEPS])
def test_a_file_begins_by_saying_what_it_is(file: Path):
    assert file.read_text().startswith("# ")


@named([*MODELS, *RUNS, *SWEEPS, *CLUSTERS])
def test_the_readme_lists_it(file: Path):
    assert f"`{file.stem}`" in (FOLDER / "README.md").read_text()


@named(FILES)
def test_a_name_needs_no_folder(file: Path):
    assert [other for other in FILES if other.stem == file.stem] == [file]
