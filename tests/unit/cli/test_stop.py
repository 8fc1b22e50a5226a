from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.cli.main import main
from shardforge.core.rundir import RunDir
from shardforge.launch import history
from shardforge.train import lock
from tests.unit.launch.slurm_stand_in import SQUEUE, Programs, programs


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Programs:
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("LOGNAME", "ann")
    return programs(tmp_path, monkeypatch)


def run_of(tmp_path: Path, *jobs: str) -> RunDir:
    run = RunDir(tmp_path / "run")
    for job in jobs:
        history.append(run.jobs, {"job": job})
    if not jobs:
        run.path.mkdir()
        run.metrics.write_text(json.dumps({"event": "start", "time": 1.0, "name": "a"}) + "\n")
    return run


def stop(run: RunDir, capsys) -> str:
    assert main(["stop", str(run.path)]) == 0
    return capsys.readouterr().out


def test_a_running_job_is_asked_by_a_file_with_the_reason(tmp_path, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    run = run_of(tmp_path, "2")
    assert stop(run, capsys).startswith("asked to stop")
    assert run.stop.read_text() == "asked by ann\n"


def test_jobs_that_wait_are_cancelled_and_no_wish_is_left_for_the_next(tmp_path, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    slurm.say("scancel")
    run = run_of(tmp_path, "4", "5_3", "6")
    assert stop(run, capsys) == "cancelled job 4 (PENDING), job 5_3 (PENDING), job 6 (PENDING)\n"
    assert "scancel 4 5_3 6" in slurm.asked() and not run.stop.exists()


def test_of_a_chain_the_running_job_is_asked_and_the_others_are_cancelled(tmp_path, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    slurm.say("scancel")
    run = run_of(tmp_path, "2", "4")
    out = stop(run, capsys)
    assert "cancelled job 4 (PENDING)" in out and "asked to stop" in out
    assert run.stop.exists()


def test_a_run_on_this_machine_is_asked_too(tmp_path, slurm, capsys):
    run = run_of(tmp_path)
    with lock.take(run.lock):
        assert stop(run, capsys).startswith("asked to stop")
    assert run.stop.read_text() == "asked by ann\n"


def test_a_run_that_is_over_is_left_alone(tmp_path, slurm, capsys):
    slurm.say("squeue", SQUEUE)
    run = run_of(tmp_path, "3")
    assert stop(run, capsys).startswith("nothing of it runs or waits: failed (job 3 CANCELLED")
    assert not run.stop.exists()


def test_where_the_queue_cannot_be_asked_the_file_is_left_for_whatever_runs(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "2")
    assert "jobs that wait stay in it: there is no squeue" in stop(run, capsys)
    assert run.stop.exists()


def test_what_is_no_run_is_a_mistake(tmp_path, slurm, capsys):
    assert main(["stop", str(tmp_path)]) == 2
    assert "no run directory" in capsys.readouterr().err
