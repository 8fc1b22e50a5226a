"""Runs of more than one job: chains that share a budget, and arrays whose elements are runs of their own."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.faults import runs
from tests.slurm import jobs
from tests.slurm.lab import wait

pytestmark = pytest.mark.slurm

ONE = {"train": jobs.LONG, "checkpoint": {"every": 10}}
TOKENS = jobs.LONG["steps"] * jobs.LONG["sequences"] * jobs.LONG["seq_len"]


def ended(run_dir) -> dict:
    return json.loads((run_dir / "stopped.json").read_text())


@pytest.fixture(scope="module")
def chain(lab, tmp_path_factory):
    """Three jobs of one budget, of which the first two are told that their time is over."""
    recipe = jobs.recipe(tmp_path_factory.mktemp("chain"), **ONE)
    job = jobs.launch(lab, recipe, "--nodes", "1", "--until", str(TOKENS), "--jobs", "3")
    for attempt, number in enumerate(job.numbers[:2], 1):
        job.until_attempt(attempt)
        lab.ask("scancel", "--batch", "--signal=USR1", number)
        lab.over(number)
    job.over()
    return job


def test_a_chain_of_three_jobs_reaches_its_budget(chain):
    assert len(chain.numbers) == 3
    assert ended(chain.run_dir)["state"] == "finished"
    assert ended(chain.run_dir)["step"] == jobs.LONG["steps"] == len(runs.losses(chain.run_dir))


def test_each_job_of_a_chain_goes_on_where_the_one_before_stopped(chain):
    begun, stopped = chain.attempts("begin"), chain.attempts("end")
    assert [each["job"] for each in begun] == chain.numbers
    assert [each["step"] for each in begun[1:]] == [each["step"] for each in stopped[:2]]
    assert [each["restart"] for each in begun] == [0, 0, 0]


def test_what_is_left_of_a_chain_is_cancelled_when_its_budget_is_reached(lab, tmp_path):
    recipe = jobs.recipe(tmp_path)
    job = jobs.launch(lab, recipe, "--nodes", "1", "--until", "end", "--jobs", "3")
    assert [lab.over(number)["JobState"] for number in job.numbers] == ["COMPLETED", "CANCELLED", "CANCELLED"]


def test_a_sweep_is_an_array_whose_elements_have_run_directories_of_their_own(lab, tmp_path):
    recipe = jobs.recipe(tmp_path)
    rates = {"slow": 0.001, "even": 0.01, "fast": 0.1}
    sweep = tmp_path / "sweep.yaml"
    arms = {name: {"schedule": {"kind": "constant", "lr": rate, "warmup": 3}} for name, rate in rates.items()}
    shared = {key: value for key, value in yaml.safe_load(recipe.read_text()).items() if key not in ("name", "run_dir")}
    sweep.write_text(json.dumps({**shared, "name": "rates", "run_dir": str(tmp_path / "run"), "arms": arms}))
    job = jobs.launch(lab, sweep, "--nodes", "1", cluster=jobs.profile(tmp_path))
    wait(lambda: not lab.ask("squeue", "-h", "-j", job.number).strip(), "the array's end", 600)
    homes = [tmp_path / "run" / name for name in rates]
    assert [ended(home)["state"] for home in homes] == ["finished"] * 3
    assert len({str(runs.losses(home)) for home in homes}) == 3
    assert {len(runs.losses(home)) for home in homes} == {runs.STEPS}
