"""What a person asks of a run in the queue: where it is, what it says, to come back, to stop; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults import runs
from tests.slurm import jobs
from tests.slurm.jobs import Job

pytestmark = pytest.mark.slurm

LASTING = {"train": jobs.LONG | {"steps": 10**6, "eval_sequences": 0}, "checkpoint": {"every": 10}}
LASTING |= {"parallel": {"dp_shard": 2}}


def say(job: Job, *words: str) -> str:
    done = job.lab.call(sys.executable, "-m", "shardforge", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def asked(lab, tmp_path_factory) -> tuple[Job, dict[str, str]]:
    """A run of two nodes: asked where it is, sent back to the queue, and stopped; what each command printed."""
    folder = tmp_path_factory.mktemp("asked")
    job = jobs.launch(lab, jobs.recipe(folder, **LASTING), "--nodes", "2")
    said, here = {}, str(job.run_dir)
    job.until_attempt(1)
    said["status"] = say(job, "status", here, "--json")
    said["logs"] = say(job, "logs", here, "--rank", "1")
    said["requeue"] = say(job, "requeue", here)
    job.until_attempt(2)
    said["page"] = say(job, "status", here)
    said["stop"] = say(job, "stop", here)
    job.over()
    said["after"] = say(job, "status", here, "--json")
    return job, said


def test_status_knows_the_job_and_the_step_of_a_running_run(asked):
    job, said = asked
    [seen] = json.loads(said["status"])
    assert seen["state"] == "running" and job.number in json.dumps(seen["jobs"])
    assert seen["step"] >= 1


def test_logs_shows_the_output_of_a_rank(asked):
    job, said = asked
    assert said["logs"].startswith(f"== {job.run_dir}") and "rank-1.log" in said["logs"].splitlines()[0]


def test_requeue_saves_and_the_run_comes_back(asked):
    job, _ = asked
    first, second = job.attempts("end")[0], job.attempts("begin")[1]
    assert first["outcome"] == "stopped" and second["step"] == first["step"]
    assert second["restart"] == 1


def test_status_tells_of_the_restart(asked):
    assert "requeue" in asked[1]["page"]


def test_stop_saves_and_the_run_does_not_come_back(asked):
    job, said = asked
    assert len(job.attempts("begin")) == 2
    last = job.attempts("end")[-1]
    assert last["outcome"] == "stopped" and last["decision"].startswith("stop")
    [seen] = json.loads(said["after"])
    assert seen["state"] != "running" and seen["step"] == last["step"]


REFUSED = {
    "partition": (["--profile-set", "queue.partition=nowhere"], "nowhere"),
    "too many nodes": (["--profile-set", "queue.partition=short", "--set", "parallel.dp_shard=4", "--nodes", "4"], ""),
    "walltime": (["--profile-set", "queue.partition=short", "--walltime", "01:00:00"], ""),
}


@pytest.mark.parametrize("words, named", REFUSED.values(), ids=list(REFUSED))
def test_what_slurm_refuses_is_told_with_the_line_of_the_profile_and_submits_nothing(lab, tmp_path, words, named):
    recipe, cluster = jobs.recipe(tmp_path), jobs.profile(tmp_path)
    done = refused(lab, recipe, cluster, *words)
    assert done.returncode != 0
    assert "lab.yaml" in done.stderr or "--profile-set" in done.stderr or "--walltime" in done.stderr, done.stderr
    assert "fix:" in done.stderr and named in done.stderr, done.stderr
    assert not (tmp_path / "run" / "launch" / "jobs.jsonl").exists()
    assert runs.losses(tmp_path / "run") == {}


def refused(lab, recipe, cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "shardforge", "launch", str(recipe), "--cluster", str(cluster), *words)
    return lab.call(*command, folder=recipe.parent)
