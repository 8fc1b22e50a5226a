from __future__ import annotations

import json
from dataclasses import replace

import pytest

from shardforge.core.rundir import RunDir
from shardforge.launch import attempts, decide, history
from shardforge.launch.decide import Limits
from shardforge.launch.history import Attempt, End

FIRST = Attempt(start="7.0.0", job="7", nodes=("n1",), time=1.0)
ENDED = End(outcome="stopped", step=0, reason="walltime", decision="again walltime", time=2.0)


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    monkeypatch.setattr(decide, "limits_of", lambda run_dir: Limits(most=2, without_progress=2))
    return RunDir(tmp_path / "run")


@pytest.fixture
def begin(run, capsys):
    """begin("7.0.0", "--alive", ...): the line that the command prints."""

    def ask(start: str, *words: str) -> str:
        job, restart, tried = start.split(".")
        own = ["--start", start, "--job", job, "--restart", restart, "--try", tried, "--nodes", "n1,n2"]
        code = attempts.main(["begin", str(run.path), *own, *words])
        line = capsys.readouterr().out.splitlines()[-1]
        assert code == (not line.startswith("go "))
        return line

    return ask


def note(run: RunDir, attempt: Attempt, end: End | None = None) -> None:
    history.begun(run.attempts, attempt)
    if end is not None:
        history.ended(run.attempts, attempt.start, end)


def test_the_first_attempt_begins(run, begin):
    assert begin("7.0.0") == "go first"
    [found] = history.read(run.attempts)
    assert (found.job, found.nodes, found.reason, found.end) == ("7", ("n1", "n2"), "first", None)


@pytest.mark.parametrize("start", ["7.1.0", "7.0.1", "8.0.0"])
def test_a_later_one_says_why_there_is_another(run, begin, start):
    note(run, FIRST, ENDED)
    assert begin(start) == "go walltime"


def test_one_after_a_stop_was_started_by_a_person(run, begin):
    note(run, FIRST, replace(ENDED, decision="stop asked by ann"))
    assert begin("8.0.0") == "go started again"


def test_an_attempt_of_the_same_job_without_an_end_was_lost(run, begin):
    note(run, FIRST)
    assert begin("7.1.0") == "go lost with its node or its job"
    assert history.read(run.attempts)[0].end.outcome == "lost"


def test_one_that_saved_before_it_was_taken_away_was_stopped(run, begin):
    note(run, FIRST)
    run.stopped.write_text(json.dumps({"state": "stopped", "reason": "SIGTERM", "step": 4, "start": "7.0.0"}))
    assert begin("7.1.0") == "go SIGTERM"
    assert history.read(run.attempts)[0].end.outcome == "stopped"


def test_an_attempt_of_a_job_that_is_gone_was_lost(run, begin):
    note(run, FIRST)
    assert begin("8.0.0", "--alive", "8\n9").startswith("go lost")


def test_a_living_job_keeps_its_directory(run, begin):
    note(run, FIRST)
    assert begin("8.0.0", "--alive", "7 8") == "stop occupied: job 7 trains in this run directory"
    assert history.read(run.attempts) == [FIRST]


def test_nobody_is_presumed_dead_when_nobody_looked(run, begin):
    note(run, FIRST)
    assert begin("8.0.0") == "go first"
    assert history.read(run.attempts)[0].end is None


def test_a_wish_to_stop_is_followed_once(run, begin):
    run.path.mkdir()
    run.stop.write_text("asked by ann\n")
    assert begin("7.0.0") == "stop asked by ann"
    assert begin("7.0.0") == "go first"


def test_a_wish_that_nobody_followed_does_not_explain_how_a_lost_attempt_ended(run, begin):
    note(run, FIRST)
    run.stop.write_text("asked by ann\n")
    assert begin("7.1.0") == "stop asked by ann"
    assert history.read(run.attempts)[0].end.outcome == "lost"


def test_the_wish_of_a_living_run_is_left_to_it(run, begin):
    note(run, FIRST)
    run.stop.write_text("asked by ann\n")
    assert begin("8.0.0", "--alive", "7").startswith("stop occupied")
    assert run.stop.exists()


def test_a_limit_that_comes_early_is_left_to_the_ranks(run, begin):
    run.path.mkdir()
    run.stop.write_text("walltime\n")
    assert begin("7.0.0") == "go first"
    assert run.stop.exists()


def test_attempts_that_nobody_decided_on_are_used_up_too(run, begin):
    begin("7.0.0")
    assert [begin(f"7.{n}.0").split()[0] for n in (1, 2, 3)] == ["go", "go", "stop"]


def test_an_attempt_that_begins_twice_is_one(run, begin):
    begin("7.0.0")
    assert begin("7.0.0") == "go first"
    assert len(history.events(run.attempts)) == 1


def test_a_disk_that_takes_nothing_stops_it(run, begin):
    run.path.write_text("no folder")
    assert begin("7.0.0").startswith("stop ")


def test_of_two_that_race_the_later_one_leaves(run, begin):
    """Both are on the file by the time the second asks."""
    begin("7.0.0", "--alive", "7 8")
    assert begin("8.0.0", "--alive", "7 8").startswith("stop occupied")
