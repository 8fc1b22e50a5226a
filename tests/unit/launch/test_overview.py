from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shardforge.checkpoint import folders
from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import history
from shardforge.launch.history import Attempt, End
from shardforge.launch.overview import expect_run, overview, runs_below
from shardforge.launch.queue import Job

START = {"event": "start", "time": 50.0, "name": "a", "layout": "one", "world_size": 1, "weights": 1, "steps": 9}
OPEN = Attempt(start="7.0.0", job="7", nodes=("n1",), time=40.0)


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n")


def submitted(run: RunDir, *jobs: str) -> None:
    for job in jobs:
        history.append(run.jobs, {"job": job, "time": 1.0})


def job(state: str, id: str = "7", **more: Any) -> Job:
    return Job(id=id, array=id, number=id, state=state, **more)


def ended(outcome: str, reason: str, decision: str) -> End:
    return End(outcome=outcome, step=0, reason=reason, decision=decision, time=60.0)


def seen(run: RunDir, *jobs: Job, owner: str = "", fates: dict[str, str] | None = None) -> tuple[str, str]:
    found = overview(run, {each.id: each for each in jobs}, fates or {}, owner)
    return found.state, found.why


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, ("new", "no step has been made")),
        ({"metrics.jsonl": START}, ("lost", "it ended without a word")),
        ({"metrics.jsonl": {"event": "end", "time": 9.0, "verdict": "failed"}}, ("failed", "")),
        ({"stopped.json": {"state": "finished", "reason": ""}}, ("finished", "")),
        ({"stopped.json": {"state": "stopped", "reason": "asked by ann"}}, ("stopped", "asked by ann")),
        ({"failure.json": {"message": "error: no disk\n  fix: x"}}, ("failed", "no disk")),
    ],
)
def test_a_run_without_slurm_is_what_it_wrote_last(run, files, state):
    for name, content in files.items():
        put(run.path / name, content)
    assert seen(run) == state


@pytest.mark.parametrize(("newer", "state"), [("stopped", "finished"), ("failure", "failed")])
def test_of_a_stop_and_a_failure_the_newer_one_counts(run, newer, state):
    put(run.stopped, {"state": "finished"})
    put(run.failure, {"message": "x"})
    os.utime(getattr(run, newer), (2e9, 2e9))
    assert seen(run)[0] == state


def test_a_living_process_runs_and_stops_when_it_was_asked_to(run):
    put(run.stopped, {"state": "stopped"})
    assert seen(run, owner="process 3 on x") == ("running", "")
    put(run.stop, "asked by ann")
    assert seen(run, owner="process 3 on x") == ("stopping", "asked to")


def test_a_job_that_never_ran_waits(run):
    submitted(run, "7")
    assert seen(run, job("PENDING", reason="Priority")) == ("queued", "Priority")


def test_a_job_that_comes_back_says_why(run):
    submitted(run, "7")
    history.begun(run.attempts, OPEN)
    history.ended(run.attempts, "7.0.0", ended("stopped", "walltime", "again walltime"))
    assert seen(run, job("PENDING", reason="BeginTime")) == ("requeued", "walltime")


def test_the_next_of_a_chain_is_queued(run):
    submitted(run, "7", "8")
    history.begun(run.attempts, OPEN)
    history.ended(run.attempts, "7.0.0", ended("stopped", "walltime", "again walltime"))
    assert seen(run, job("COMPLETED"), job("PENDING", "8", reason="Dependency")) == ("queued", "Dependency")


def test_a_job_that_was_submitted_by_hand_is_known_from_its_attempt(run):
    submitted(run, "6")
    history.begun(run.attempts, OPEN)
    put(run.metrics, START)
    assert seen(run, job("FAILED", "6"), job("RUNNING")) == ("running", "")


def test_a_held_job_is_held(run):
    submitted(run, "7")
    assert seen(run, job("PENDING", reason="JobHeldUser")) == ("held", "JobHeldUser")


def test_a_job_in_preflight_starts(run):
    submitted(run, "7")
    assert seen(run, job("RUNNING"))[0] == "starting"


def test_an_attempt_runs_once_it_has_written_something(run):
    submitted(run, "7")
    history.begun(run.attempts, OPEN)
    put(run.metrics, {**START, "time": 30.0})
    assert seen(run, job("RUNNING"))[0] == "starting"
    put(run.metrics, START)
    assert seen(run, job("RUNNING")) == ("running", "")


def test_a_job_that_slurm_ends_stops(run):
    submitted(run, "7")
    assert seen(run, job("COMPLETING"))[0] == "stopping"


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (ended("finished", "all steps are done", "finished"), ("finished", "")),
        (ended("stopped", "asked by ann", "stop asked by ann"), ("stopped", "asked by ann")),
        (ended("failed", "crash: x", "stop 2 attempts"), ("failed", "crash: x")),
        (ended("lost", "lost n1", "stop 6 failures"), ("failed", "lost n1")),
        (ended("lost", "ended by Slurm (COMPLETING)", "again ..."), ("lost", "ended by Slurm (COMPLETING)")),
        (None, ("lost", "its job is gone, and nobody saw the end")),
    ],
)
def test_a_cluster_run_without_a_job_is_how_its_last_attempt_ended(run, end, state):
    submitted(run, "7")
    history.begun(run.attempts, OPEN)
    if end is not None:
        history.ended(run.attempts, "7.0.0", end)
    assert seen(run) == state


def test_slurm_says_how_a_job_ended_that_nobody_saw_end(run):
    submitted(run, "7")
    assert seen(run, job("CANCELLED")) == ("failed", "job 7 CANCELLED before it began")
    history.begun(run.attempts, OPEN)
    assert seen(run, fates={"7": "NODE_FAIL"}) == ("lost", "job 7 NODE_FAIL")


def test_a_run_that_was_told_to_end_says_what_slurm_calls_it(run):
    submitted(run, "7")
    history.begun(run.attempts, OPEN)
    history.ended(run.attempts, "7.0.0", ended("stopped", "SIGTERM", "again SIGTERM"))
    assert seen(run) == ("stopped", "SIGTERM")
    assert seen(run, job("CANCELLED")) == ("stopped", "job 7 CANCELLED")


def test_jobs_that_run_come_before_those_that_wait_and_old_ones_are_left_out(run):
    submitted(run, "6", "7", "8")
    known = {each.id: each for each in (job("COMPLETED", "6"), job("PENDING", "7"), job("RUNNING", "8"))}
    assert [each.id for each in overview(run, known, {}, "").jobs] == ["8", "7"]


def test_checkpoint_layout_and_verdict_are_found(run):
    (run.checkpoints / folders.name(5)).mkdir(parents=True)
    put(run.checkpoints / folders.name(5) / folders.MARKER, "")
    put(run.provenance, [{"layout": "one"}, {"layout": "dp2", "device": "2 x cpu"}])
    put(run.verdict, "error: rank 3 is frozen\nmore\n")
    found = overview(run, {}, {}, "")
    assert (found.saved, found.layout, found.device, found.starts) == (5, "dp2", "2 x cpu", 2)
    assert (found.verdict, found.verdict_page) == ("rank 3 is frozen", run.verdict)


def test_without_a_page_the_failure_is_the_verdict(run):
    put(run.failure, {"message": "rank 0 failed:\nTraceback (most recent call last):\n  x\nValueError: bad"})
    assert overview(run, {}, {}, "").verdict == "rank 0 failed: ValueError: bad"


def test_runs_are_found_below_a_folder_also_those_of_a_sweep(tmp_path):
    for name in ("b", "a", "sweep/x", "sweep/y", "none/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("b", "sweep/x", "sweep/y"):
        put(tmp_path / name / "metrics.jsonl", START)
    put(tmp_path / "a" / "launch" / "jobs.jsonl", {"job": "7"})
    assert [str(path.relative_to(tmp_path)) for path in runs_below(tmp_path)] == ["a", "b", "sweep/x", "sweep/y"]


def test_a_misspelt_run_is_named(tmp_path):
    put(tmp_path / "first" / "metrics.jsonl", START)
    with pytest.raises(LaunchError, match="did you mean 'first'"):
        expect_run(tmp_path / "frist")
