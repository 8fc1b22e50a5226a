from __future__ import annotations

import pytest

from shardforge.cli.main import main
from shardforge.core.rundir import RunDir
from shardforge.launch import history
from shardforge.launch.history import Attempt


@pytest.fixture
def run(tmp_path) -> RunDir:
    found = RunDir(tmp_path / "run")
    history.append(found.jobs, {"job": "7"})
    history.begun(found.attempts, Attempt(start="7.0.0", job="7", time=1.0))
    (found.logs / "7.0.0").mkdir(parents=True)
    (found.logs / "7.0.0" / "rank-3.log").write_text("".join(f"line {number}\n" for number in range(99)))
    (found.logs / "job-7.log").write_text("begun\n")
    return found


def test_the_last_lines_of_a_rank_are_printed_below_the_name_of_the_file(run, capsys):
    assert main(["logs", str(run.path), "--rank", "3", "--lines", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"== {run.logs}/7.0.0/rank-3.log", "line 97", "line 98"]


def test_without_a_rank_the_job_speaks(run, capsys):
    assert main(["logs", str(run.path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"== {run.logs}/job-7.log", "begun"]


def test_ctrl_c_ends_following(run, capsys, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)
    assert main(["logs", str(run.path), "--follow"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "begun"


def test_a_rank_that_is_not_there_is_a_mistake(run, capsys):
    assert main(["logs", str(run.path), "--rank", "9"]) == 2
    assert "logs there: 3 to 3" in capsys.readouterr().err
