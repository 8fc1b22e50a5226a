from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import chain, cluster
from shardforge.launch.job import Job, Wishes, plan
from tests.tiny import tiny

TRAIN = {"steps": 100, "sequences": 8, "seq_len": 16}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """An hour, of which startup, lead and Slurm's minute take 20: 40 minutes for steps."""
    loaded = cluster.load("cpu", ["storage.local=[]", "queue.lead_s=600", "queue.startup_s=540"])
    recipe = tiny(train=TRAIN, run_dir=str(tmp_path / "run"))
    return plan({"tiny": recipe}, loaded, Wishes(walltime="1:00:00"), name="tiny", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "count"), [("15_000", 15000), ("15e9", 15 * 10**9), ("15B", 15 * 10**9), ("1.5T", 15 * 10**11)]
)
def test_a_budget_is_read_as_people_write_it(text: str, count: int):
    assert chain.tokens(text) == count


def test_a_budget_that_is_no_number_is_a_mistake():
    with pytest.raises(LaunchError, match="'many' is no number of tokens"):
        chain.tokens("many")


@pytest.mark.parametrize(("budget", "steps"), [(1, 1), (128, 1), (129, 2), (12800, 100)])
def test_steps_read_at_least_the_budget(budget: int, steps: int):
    assert chain.steps_of(budget, tiny(train=TRAIN).train) == steps


def test_a_growing_batch_takes_more_steps():
    warmup = {"start": 2, "increment": 2, "steps": 9}
    train = tiny(train=TRAIN | {"batch_warmup": warmup}).train
    assert chain.steps_of(9 * 4 * 16, train) == 9


def test_a_chain_is_as_long_as_its_steps_fill_walltimes(job: Job):
    assert chain.length(job, 24.0) == 1 and chain.length(job, 24.1) == 2 and chain.length(job, 72.0) == 3


def test_without_a_given_time_the_newest_steps_of_the_run_count(job: Job):
    run = job.runs[0]
    run.path.mkdir()
    steps = [{"event": "step", "time": 0.0, "seconds": s} for s in (900.0, *[48.0] * 100)]
    run.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert chain.length(job, None) == 2


def test_a_run_that_has_no_step_yet_needs_a_time(job: Job):
    with pytest.raises(LaunchError) as error:
        chain.length(job, None)
    assert "--step-seconds" in error.value.fix


def test_steps_that_are_committed_count_no_more(job: Job):
    commit(job.runs[0], 80)
    assert chain.length(job, 72.0) == 1


def test_a_chain_without_end_is_a_mistake(job: Job):
    with pytest.raises(LaunchError, match="more than 500"):
        chain.length(replace(job), 1e6)


def commit(run: RunDir, step: int) -> None:
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "COMMITTED").write_text("")
