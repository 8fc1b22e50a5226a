from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.cli.main import main


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The arguments that build a small corpus into tmp_path/out."""
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"line {number}\n" * 20)
    options = ["--vocab", "300", "--held-out", "0.2", "--workers", "1"]
    return ["data", "build", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), *options]


@pytest.fixture
def built(words: list[str], tmp_path: Path) -> Path:
    assert main(words) == 0
    return tmp_path / "out"


@pytest.fixture
def recipe(built: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: [{Path('recipes/runs/first.yaml').resolve()}]\n"
        f"data: {{sources: [{{path: {built}}}]}}\n"
        "parallel: {dp_shard: 1}\n"
        "schedule: {warmup: 1}\n"
        "train: {steps: 5, sequences: 4, seq_len: 32}\n"
    )
    return str(path)


def test_a_build_prints_what_it_made(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(words)
    out = capsys.readouterr().out
    assert f"built {tmp_path / 'out'}" in out and "stored as uint16" in out


def test_a_build_asked_for_again_says_so(built: Path, words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(words) == 0
    assert "already built" in capsys.readouterr().out


def test_a_corpus_is_verified(built: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "verify", str(built)]) == 0
    assert "fingerprint" in capsys.readouterr().out


def test_show_prints_the_first_documents(built: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data", "show", str(built)]) == 0
    out = capsys.readouterr().out
    assert "in/00.txt" in out and "line 0\nline 0\n" in out


def test_trace_names_the_documents_of_the_chosen_rows(built: Path, recipe: str, capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    assert main(["data", "trace", recipe, "--step", "2", "--rows", "1-2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert {line.split()[0] for line in lines} == {"1", "2"} and all("in/" in line for line in lines)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--step", "5"], "from 0 to 4"),
        (["--step", "0", "--rows", "2-9"], "from 0 to 3"),
        (["--step", "0", "--rows", "two"], "'two'"),
    ],
)
def test_a_step_or_row_that_is_not_there_is_refused(
    recipe: str, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["data", "trace", recipe, *extra]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "neither a recipe nor"),
        (["--input", "x", "--output", "y", "--vocab", "12"], "at least 257"),
        (["--input", "x", "--output", "y", "--held-out", "0.9"], "at most 0.5"),
        (["--input", "x", "--output", "y", "--workers", "0"], "at least 1"),
        (["first", "--input", "x"], "--set data.build.x=y"),
        (["--input", "nowhere-at-all", "--output", "y"], "nowhere-at-all"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "build", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_says_what_is_built(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "run.yaml"
    path.write_text(
        f"base: [{Path('recipes/runs/first.yaml').resolve()}]\n"
        f"data: {{build: {{inputs: [{tmp_path / 'in'}], output: {tmp_path / 'made'}, tokenizer: {{vocab: 300}}}}}}\n"
    )
    assert main(["data", "build", str(path), "--workers", "1"]) == 0
    assert f"built {tmp_path / 'made'}" in capsys.readouterr().out
