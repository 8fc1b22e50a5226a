"""`shardforge sweep` from the file to the report, with real runs of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.cli.main import main
from shardforge.data.synthetic import markov
from tests.tiny import mapping


@pytest.fixture
def file(tmp_path) -> Path:
    markov(tmp_path / "corpus", vocab=32, documents=40, tokens=30)
    recipe = mapping(data={"sources": [{"path": str(tmp_path / "corpus")}]})
    arms = {"slow": {"schedule": {"lr": 0.001}}, "fast": {"schedule": {"lr": 0.02}}}
    path = tmp_path / "rates.yaml"
    path.write_text(json.dumps(recipe | {"run_dir": str(tmp_path / "out"), "arms": arms}))
    return path


def test_an_unknown_arm_is_a_mistake_with_a_suggestion(file, capsys):
    assert main(["sweep", str(file), "--arm", "fats"]) == 2
    assert "no arm is called 'fats'" in (said := capsys.readouterr().err) and "did you mean 'fast'?" in said


def test_a_wrong_arm_stops_the_sweep_before_it_begins(file, capsys):
    assert main(["sweep", str(file), "--set", "train.sequences=0"]) == 2
    assert "0 is not at least 1" in capsys.readouterr().err and not (file.parent / "out").exists()


def test_a_report_of_nothing_says_so(file, capsys):
    assert main(["sweep", str(file), "--report"]) == 0
    assert "no arm has begun" in capsys.readouterr().out


@pytest.mark.slow
def test_both_arms_are_trained_and_overlaid_and_a_second_call_trains_nothing(file, capfd):
    assert main(["sweep", str(file)]) == 0
    out = file.parent / "out"
    states = [json.loads((out / arm / "stopped.json").read_text())["state"] for arm in ("slow", "fast")]
    assert states == ["finished", "finished"] and (out / "report.html").is_file() and (out / "report.png").is_file()
    before = (out / "fast" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert main(["sweep", str(file)]) == 0
    assert (out / "fast" / "metrics.jsonl").read_bytes() == before
