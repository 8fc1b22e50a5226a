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
    monkeypatch.setenv("LOGNAME", "ann")
    found = programs(tmp_path, monkeypatch)
    found.say("squeue", SQUEUE)
    found.say("scontrol")
    found.say("sbatch", "12\n")
    return found


def run_of(tmp_path: Path, job: str) -> RunDir:
    run = RunDir(tmp_path / "run")
    history.append(run.jobs, {"job": job, "cluster": "c", "chain": "1", "time": 1.0})
    run.script.write_text("#!/bin/bash\n")
    return run


def requeue(run: RunDir, capsys, *words: str) -> str:
    assert main(["requeue", str(run.path), *words]) == 0
    return capsys.readouterr().out


def acts(slurm: Programs) -> list[str]:
    return [line for line in slurm.asked() if not line.startswith("squeue")]


def test_a_running_job_saves_first(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "2")
    assert "job 2 saves after its step" in requeue(run, capsys)
    assert run.stop.read_text() == "requeue asked by ann\n" and acts(slurm) == []


def test_at_once_it_is_slurm_that_requeues(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "5_1")
    requeue(run, capsys, "--now")
    assert acts(slurm) == ["scontrol requeue 8"] and not run.stop.exists()


def test_a_held_job_is_released(tmp_path, slurm, capsys):
    assert requeue(run_of(tmp_path, "6"), capsys) == "job 6 was held, and is released\n"
    assert acts(slurm) == ["scontrol release 6"]


def test_a_job_that_waits_is_left_alone(tmp_path, slurm, capsys):
    assert "is in the queue already: Dependency" in requeue(run_of(tmp_path, "4"), capsys)
    assert acts(slurm) == []


def test_a_run_without_a_job_is_submitted_again_and_recorded(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "3")
    run.stop.write_text("asked by ann\n")
    assert requeue(run, capsys) == "job 12 submitted, with the script of job 3\n"
    assert acts(slurm) == [f"sbatch --parsable {run.script}"] and not run.stop.exists()
    last = history.events(run.jobs)[-1]
    assert (last["job"], last["cluster"], "chain" in last) == ("12", "c", False)


def test_an_element_of_an_array_is_submitted_alone(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "77_3")
    assert "job 12_3 submitted" in requeue(run, capsys)
    assert acts(slurm) == [f"sbatch --parsable --array=3 {run.script}"]


def mistake(run: RunDir, capsys) -> str:
    assert main(["requeue", str(run.path)]) == 2
    return capsys.readouterr().err


def test_a_finished_run_is_not_submitted_again(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "3")
    run.stopped.write_text(json.dumps({"state": "finished", "reason": ""}))
    assert "all of its steps are done" in mistake(run, capsys)


def test_a_run_on_this_machine_is_no_job(tmp_path, slurm, capsys):
    run = run_of(tmp_path, "3")
    with lock.take(run.lock):
        assert "it is no job of Slurm but process" in mistake(run, capsys)


def test_a_run_that_was_never_submitted_says_how(tmp_path, slurm, capsys):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.metrics.write_text("")
    assert "was never submitted" in mistake(run, capsys)


def test_an_unknown_queue_is_no_reason_to_submit_twice(tmp_path, slurm, capsys):
    slurm.say("squeue", "", "Unable to contact slurm controller", 1)
    assert "the queue is not known" in mistake(run_of(tmp_path, "2"), capsys)
    assert acts(slurm) == []


def test_a_refusal_of_slurm_is_told(tmp_path, slurm, capsys):
    slurm.say("sbatch", "", "sbatch: error: invalid partition specified: x", 1)
    run = run_of(tmp_path, "3")
    assert "invalid partition specified: x" in mistake(run, capsys)
    assert len(history.events(run.jobs)) == 1
