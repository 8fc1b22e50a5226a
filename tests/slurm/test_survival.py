"""What happens to jobs, after which the run goes on to its last step with the losses of one that was left in peace."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shardforge.checkpoint import folders
from tests.faults import runs
from tests.slurm import jobs
from tests.slurm.jobs import Job
from tests.slurm.lab import Lab, wait

pytestmark = pytest.mark.slurm

LAYOUT = {"parallel": {"dp_shard": 2}, "train": jobs.LONG, "checkpoint": {"every": 10, "keep_last": 1000}}
LAST = jobs.LONG["steps"]


@dataclass
class Story:
    """A run, in order what was done to it, and the commits that were there before each."""

    job: Job
    nodes: list[list[str]] = field(default_factory=list)
    before: list[list[int]] = field(default_factory=list)
    slurm: dict[str, str] = field(default_factory=dict)

    def attempt(self, number: int) -> list[str]:
        """Wait until it trains; its nodes."""
        self.nodes.append(self.job.until_attempt(number)["nodes"])
        self.before.append(folders.committed(self.job.run_dir / "checkpoints"))
        return self.nodes[-1]


@pytest.fixture(scope="module")
def alone(ranks, tmp_path_factory) -> dict[int, tuple[float, float]]:
    """Step -> loss of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    ranks(2).run(runs.turn, jobs.recipe(folder, **LAYOUT))
    return runs.losses(folder / "run")


@pytest.fixture(scope="module")
def eventful(lab: Lab, tmp_path_factory) -> Story:
    """Warned of its time limit, then a rank killed, then a node taken from it, then a node drained."""
    folder = tmp_path_factory.mktemp("eventful")
    story = Story(jobs.launch(lab, jobs.recipe(folder, **LAYOUT), "--nodes", "2"))
    story.attempt(1)
    story.job.warn()
    story.attempt(2)
    story.job.kill(rank=1)
    lost = story.attempt(3)[1]
    lab.mark_down(lost)
    drained = story.attempt(4)[0]
    try:
        lab.ask("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
        story.slurm = story.job.over()
    finally:
        for node in (lost, drained):
            lab.mark_well(node)
        lab.idle()
    return story


def test_an_eventful_run_ends_with_the_losses_of_an_undisturbed_one(eventful, alone):
    assert eventful.slurm["JobState"] == "COMPLETED", eventful.job.told()
    assert runs.losses(eventful.job.run_dir) == alone
    assert len(alone) == LAST


def test_no_commit_is_lost_whatever_happens(eventful):
    after = set(folders.committed(eventful.job.run_dir / "checkpoints"))
    assert [set(before) - after for before in eventful.before] == [set()] * 4


def test_a_run_that_is_warned_of_its_limit_saves_and_comes_back_in_the_queue(eventful):
    first, second = eventful.job.attempts("end")[0], eventful.job.attempts("begin")[1]
    assert (first["outcome"], first["reason"].split()[0]) == ("stopped", "walltime")
    assert second["step"] == first["step"] and second["restart"] == 1


def test_a_killed_rank_costs_a_try_inside_the_job(eventful):
    second, third = eventful.job.attempts("end")[1], eventful.job.attempts("begin")[2]
    assert second["outcome"] == "failed" and second["decision"].startswith("again crash")
    assert (third["restart"], third["try"]) == (1, 2)


def test_a_job_that_lost_a_node_comes_back_on_others(eventful):
    third, fourth = eventful.job.attempts("end")[2], eventful.job.attempts("begin")[3]
    assert third["outcome"] in ("lost", "failed", "stopped") and fourth["restart"] == 2
    assert eventful.nodes[2][1] not in fourth["nodes"]


def test_a_drained_node_keeps_its_job(eventful):
    assert len(eventful.job.attempts("begin")) == 4
    assert eventful.job.attempts("end")[3]["outcome"] == "finished"


@pytest.fixture(scope="module")
def displaced(lab: Lab, tmp_path_factory) -> Story:
    """Preempted by a job of a higher partition, then the power of a node cut."""
    folder = tmp_path_factory.mktemp("displaced")
    cluster = jobs.profile(folder, queue={"partition": "low"})
    story = Story(jobs.launch(lab, jobs.recipe(folder, **LAYOUT), "--nodes", "2", cluster=cluster))
    story.attempt(1)
    urgent = tmp_path_factory.mktemp("urgent") / "job"
    urgent.write_text("#!/bin/bash\nsleep 5\n")
    first = lab.submit(urgent, "--partition=high", "--nodes=4", "--exclusive")
    lab.over(first)
    lost = story.attempt(2)[1]
    lab.cut_power(lost)
    try:
        story.attempt(3)
        story.slurm = story.job.over()
    finally:
        lab.power_on(lost)
        lab.idle()
    return story


def test_a_preempted_run_saves_in_its_grace_and_comes_back(displaced):
    first, second = displaced.job.attempts("end")[0], displaced.job.attempts("begin")[1]
    assert (first["outcome"], first["reason"].split()[0]) == ("stopped", "SIGTERM")
    assert (second["step"], second["restart"]) == (first["step"], 1)


def test_a_job_whose_node_lost_its_power_comes_back_on_others_with_all_commits(displaced):
    third = displaced.job.attempts("begin")[2]
    assert displaced.job.attempts("end")[1]["outcome"] == "lost"
    assert displaced.nodes[1][1] not in third["nodes"] and third["restart"] == 2
    after = set(folders.committed(displaced.job.run_dir / "checkpoints"))
    assert [set(before) - after for before in displaced.before] == [set()] * 3


def test_a_displaced_run_ends_with_the_losses_of_an_undisturbed_one(displaced, alone):
    assert displaced.slurm["JobState"] == "COMPLETED", displaced.job.told()
    assert runs.losses(displaced.job.run_dir) == alone


@pytest.fixture(scope="module")
def cancelled(lab: Lab, tmp_path_factory) -> Story:
    """Its time limit moved so near that Slurm itself warns it; then, in its second attempt, cancelled."""
    folder = tmp_path_factory.mktemp("cancelled")
    endless = LAYOUT | {"train": jobs.LONG | {"steps": 10**6, "eval_sequences": 0}}
    story = Story(jobs.launch(lab, jobs.recipe(folder, **endless), "--nodes", "2"))
    story.attempt(1)
    lab.ask("scontrol", "update", f"JobId={story.job.number}", "EndTime=now+70seconds")
    story.job.until(lambda: story.job.slurm()["Restarts"] == "1", "requeued")
    lab.ask("scontrol", "update", f"JobId={story.job.number}", "TimeLimit=30")
    story.attempt(2)
    lab.ask("scancel", story.job.number)
    story.job.over()
    lab.idle()
    story.slurm = story.job.slurm()
    return story


def test_slurm_itself_warns_a_run_ahead_of_its_limit(cancelled):
    first, second = cancelled.job.attempts("end")[0], cancelled.job.attempts("begin")[1]
    assert (first["outcome"], first["reason"].split()[0]) == ("stopped", "walltime")
    assert (second["step"], second["restart"]) == (first["step"], 1)


def test_a_cancelled_job_stays_cancelled_and_has_saved(cancelled):
    assert (cancelled.slurm["JobState"], cancelled.slurm["Restarts"]) == ("CANCELLED", "1")
    assert len(cancelled.job.attempts("begin")) == 2
    committed = folders.committed(cancelled.job.run_dir / "checkpoints")
    assert max(committed) >= cancelled.job.step()


def test_a_run_that_dies_again_and_again_without_progress_is_given_up(lab, tmp_path):
    job = jobs.launch(lab, jobs.recipe(tmp_path, **LAYOUT), "--nodes", "2")
    killed: set[int] = set()

    def kill_the_next() -> bool:
        over = job.slurm()["JobState"] in ("FAILED", "COMPLETED", "CANCELLED")
        for pid in () if over else job.ranks(0):
            if pid not in killed:
                killed.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return over

    wait(kill_the_next, "given up", 300)
    assert job.slurm()["JobState"] == "FAILED", job.told()
    assert [end["outcome"] for end in job.attempts("end")] == ["failed"] * len(killed)
    assert job.attempts("end")[-1]["decision"].startswith("stop")
    assert 2 <= len(killed) <= 3


def test_a_rank_that_hangs_is_named_with_its_node_and_the_run_goes_on_without_it(lab, tmp_path, alone):
    hasty = LAYOUT | {"train": jobs.LONG | {"timeout": 10}}
    job = jobs.launch(lab, jobs.recipe(tmp_path, **hasty), "--nodes", "2")
    node = job.until_attempt(1)["nodes"][1]
    job.kill(1, signal.SIGSTOP)
    job.until((job.run_dir / "verdict.txt").exists, "a verdict")
    job.until_attempt(2, steps=1)
    page = Path(job.run_dir / "verdict.txt").read_text()
    assert "rank 1" in page and node in page, page
    assert job.over()["JobState"] == "COMPLETED", job.told()
    assert runs.losses(job.run_dir) == alone
