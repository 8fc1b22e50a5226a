from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from shardforge.cli.main import main
from tests.tiny import GQA, mapping


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A tiny recipe on two data ranks."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(mapping(parallel={"dp_shard": 2}, mixer=dict(GQA))))
    return str(path)


def test_a_sound_layout_prints_its_row_and_a_verdict(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: 1 layout against one process")
    assert any(line.startswith("dp2 ") and line.endswith("equal") for line in lines)
    assert lines[-1] == "verified: the case equals one process"


def test_json_is_one_object_and_progress_goes_elsewhere(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main(["verify", recipe, "--layout", "tp2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [case["layout"] for case in found["cases"]] == ["tp2"] and found["exit_code"] == 0
    assert "against one process" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "dp3"], "cannot be shared evenly by 3 data ranks"),
        (["--layout", "tp8"], "cannot be split 8 ways over tp"),
        (["--layout", "xx2"], "cannot read layout 'xx2'"),
        (["--processes", "0"], "0 processes show nothing"),
        (["--steps", "0"], "0 steps show nothing"),
        (["--layout", "dp2", "--all"], "not allowed with argument"),
        (["--set", "train.steps=x"], "expected int"),
    ],
)
def test_bad_input_is_told_before_any_rank_starts(
    recipe: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["verify", recipe, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "no-such-recipe"]) == 2
    assert "there is no recipe 'no-such-recipe'" in capsys.readouterr().err
