from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardforge.cli import show
from shardforge.core.errors import RecipeError
from shardforge.recipe.load import load
from tests.unit.recipe.stock import TEXT, stocked

Show = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with two recipes, a and b, that differ in one value."""
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: x\n" + TEXT)
    Path("b.yaml").write_text("base: a.yaml\ntrain: {steps: 20}\nobserve: [board]\n")
    with stocked():
        yield tmp_path


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Show:
    """Run the command; its exit code and what it printed come back."""

    def run(*words: str) -> tuple[int, str]:
        parser = argparse.ArgumentParser()
        show.add_arguments(parser)
        return show.run(parser.parse_args(words)), capsys.readouterr().out

    return run


def test_every_value_is_shown_with_its_origin(shown: Show):
    lines = shown("a.yaml", "--set", "seed=4")[1].splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["name:", "x", "#", "a.yaml:1:7"],
        ["seed:", "4", "#", "--set", "seed=4"],
        ["run_dir:", "null", "#", "default"],
    ]


def test_what_is_shown_is_the_recipe(shown: Show):
    Path("copy.yaml").write_text(shown("b.yaml")[1])
    assert load("copy.yaml").recipe == load("b.yaml").recipe


def test_json_holds_recipe_origins_and_hash(shown: Show):
    found = json.loads(shown("a.yaml", "--json")[1])
    assert (found["recipe"]["seed"], found["origins"]["train.steps"], len(found["hash"])) == (0, "a.yaml:11:16", 16)


def test_two_recipes_are_compared_field_by_field(shown: Show):
    code, text = shown("a.yaml", "b.yaml")
    assert (code, text.splitlines()) == (
        1,
        [
            "train.steps     10  # a.yaml:11:16  20  # b.yaml:2:16",
            "observe         []  # default       (absent)",
            "observe.0.kind  (absent)            board  # b.yaml:3:11",
            "observe.0.note  (absent)            ''  # default",
        ],
    )


def test_equal_recipes_exit_with_zero(shown: Show):
    assert shown("a.yaml", "a.yaml") == (0, "the recipes are equal\n")


def test_set_goes_over_both_recipes(shown: Show):
    assert shown("a.yaml", "b.yaml", "--set", "train.steps=5", "--set", "observe=[]")[0] == 0


def test_differences_are_json_on_request(shown: Show):
    code, text = shown("a.yaml", "b.yaml", "--json")
    assert (code, json.loads(text)[:2]) == (
        1,
        [
            {
                "field": "train.steps",
                "left": {"value": 10, "origin": "a.yaml:11:16"},
                "right": {"value": 20, "origin": "b.yaml:2:16"},
            },
            {"field": "observe", "left": {"value": [], "origin": "default"}},
        ],
    )


def test_schema_is_printed_without_a_recipe(shown: Show):
    assert json.loads(shown("--schema")[1])["title"] == "ShardForge recipe"


@pytest.mark.parametrize("words", [(), ("a.yaml", "b.yaml", "a.yaml")])
def test_one_or_two_recipes_are_wanted(shown: Show, words: tuple[str, ...]):
    with pytest.raises(RecipeError, match=f"expected one recipe or two, got {len(words)}"):
        shown(*words)


def test_the_command_imports_neither_torch_nor_yaml():
    code = "import sys, shardforge.cli.show; print({'torch', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
