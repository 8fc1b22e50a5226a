from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shardforge.cli.main import main
from tests.unit.launch.slurm_stand_in import SCONTROL, SQUEUE, Programs, programs

START = {"event": "start", "time": 50.0, "name": "a", "layout": "one", "world_size": 1, "weights": 1, "steps": 9}


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Programs:
    return programs(tmp_path, monkeypatch)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """Below runs/: `one` with job 2, `two` without."""
    monkeypatch.chdir(tmp_path)
    for name, file, content in (("one", "launch/jobs.jsonl", {"job": "2"}), ("two", "metrics.jsonl", START)):
        path = tmp_path / "runs" / name / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content) + "\n")
    return tmp_path / "runs"


def test_one_run_is_a_page(runs, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    slurm.say("scontrol", SCONTROL)
    assert main(["status", "runs/one"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/one: starting (preflight, or between two attempts)",
        "  job         2 RUNNING on 2 nodes (node[1-2]), main, 9m59s left of 1d00h",
        "  without     node4",
    ]


@pytest.mark.parametrize("words", [[], ["--all"], ["--all", "runs"], ["runs"]])
def test_all_runs_are_a_table_and_one_question_to_the_queue(runs, slurm, capsys, words):
    slurm.say("squeue", SQUEUE)
    assert main(["status", *words]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["runs/one", "starting"],
        ["runs/two", "lost"],
    ]
    assert len(slurm.asked()) == 1


def test_json_is_a_list(runs, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    assert main(["status", "--json", "runs/one", "runs/two"]) == 0
    assert [each["state"] for each in json.loads(capsys.readouterr().out)] == ["starting", "lost"]


def test_a_queue_that_cannot_be_asked_is_said_and_the_rest_is_shown(runs, slurm, capsys):
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "runs/two" in out and "the queue is not known: there is no squeue on this machine" in out


def test_without_a_job_the_queue_is_not_asked(runs, slurm, capsys):
    assert main(["status", "runs/two"]) == 0
    assert "queue" not in capsys.readouterr().out and slurm.asked() == []


@pytest.mark.parametrize(("words", "told"), [(["x"], "no such folder"), (["."], "no run is below")])
def test_a_place_without_runs_is_a_mistake(tmp_path, monkeypatch, slurm, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    assert main(["status", *words]) == 2
    assert told in capsys.readouterr().err


def test_it_answers_without_torch():
    modules = "status, stop, requeue, logs"
    code = (
        f"import sys; from shardforge.cli import {modules}; status.look([]); from shardforge.launch import logs, status"
    )
    assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"]).returncode == 0
