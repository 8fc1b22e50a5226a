"""Submission, with a program in the place of sbatch that says what a real one says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.launch import cluster, submit
from shardforge.launch.job import Job, Wishes, plan
from shardforge.recipe.load import load
from tests.tiny import tiny

SBATCH = """#!/bin/bash
echo "$*" >>{folder}/asked
cat >{folder}/script
[[ -s {folder}/refusal ]] && {{ cat {folder}/refusal >&2; exit 1; }}
case $1 in
--test-only) echo "sbatch: Job 1 to start at noon" >&2 ;;
*) echo $((40 + $(grep -c parsable {folder}/asked))) ;;
esac
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    loaded = cluster.load("cpu", ["storage.local=[]", "queue.partition=gpu"])
    recipe = tiny(run_dir=str(tmp_path / "run"))
    return plan({"tiny": recipe}, loaded, Wishes(), name="tiny", folder=tmp_path)


def asked(job: Job) -> list[str]:
    return (job.folder / "asked").read_text().splitlines()


def test_a_job_is_tried_before_it_is_submitted(job: Job):
    assert submit.submit(job, "#!/bin/bash\n")[0].job == "41"
    assert asked(job) == ["--test-only", "--parsable"]


def test_the_run_keeps_script_recipe_profile_and_job(job: Job):
    submit.submit(job, "#!/bin/bash\n")
    (run,) = job.runs
    assert run.script.read_text() == "#!/bin/bash\n"
    assert load(run.launch / "recipe.yaml").recipe == job.recipe
    assert cluster.load(run.launch / "cluster.yaml").config == job.cluster.config
    entry = json.loads(run.jobs.read_text())
    assert (entry["job"], entry["cluster"], entry["nodes"], entry["walltime"]) == ("41", "cpu", 1, "04:00:00")


def test_a_submission_takes_back_an_earlier_wish_to_stop(job: Job):
    (run,) = job.runs
    run.path.mkdir()
    run.stop.write_text("asked by ada")
    submit.submit(job, "#!/bin/bash\n")
    assert not run.stop.exists()


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("sbatch: error: invalid partition specified: gpu", "queue.partition"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "queue.account"),
        ("Batch job submission failed: Invalid qos specification", "queue.qos"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "queue.walltime"),
        ("sbatch: unrecognized option '--container-image=x'", "queue.options"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "node.gpus"),
    ],
)
def test_a_refusal_points_to_the_field_it_is_about(job: Job, words: str, field: str):
    (job.folder / "refusal").write_text(words)
    with pytest.raises(LaunchError) as error:
        submit.submit(job, "#!/bin/bash\n")
    assert error.value.where.endswith(field) and words.split(": ")[-1].split(";")[0] in error.value.what


def test_a_controller_that_does_not_answer_is_no_refusal(job: Job):
    (job.folder / "refusal").write_text("sbatch: error: Unable to contact slurm controller (connect failure)")
    with pytest.raises(submit.NoController, match="does not answer"):
        submit.test(job, "#!/bin/bash\n")


def test_a_refused_job_leaves_nothing_behind(job: Job):
    (job.folder / "refusal").write_text("no")
    with pytest.raises(LaunchError):
        submit.submit(job, "#!/bin/bash\n")
    assert not job.runs[0].path.exists() and asked(job) == ["--test-only"]


def test_without_slurm_the_message_says_where_to_go(job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError) as error:
        submit.submit(job, "")
    assert "there is no sbatch on this machine" in str(error.value) and "--cluster local" in str(error.value)


def test_the_jobs_of_a_chain_wait_for_each_other_by_name(job: Job):
    done = submit.submit(replace(job, chained=True), "#!/bin/bash\n", count=3)
    assert [each.job for each in done] == ["41", "42", "43"] and {each.chain for each in done} == {"41"}
    assert asked(job)[1:] == ["--parsable --dependency=singleton"] * 3


def test_the_jobs_of_a_chain_wait_for_each_other_by_number_where_the_profile_says_so(job: Job):
    loaded = cluster.load("cpu", ["storage.local=[]", "queue.chain=afterany"])
    submit.submit(replace(job, chained=True, cluster=loaded), "#!/bin/bash\n", count=3)
    assert [line.split()[1:] for line in asked(job)[1:]] == [
        [],
        ["--dependency=afterany:41"],
        ["--dependency=afterany:42"],
    ]


def test_each_run_of_an_array_gets_its_own_recipe_and_job(job: Job, tmp_path: Path):
    recipes = {arm: tiny(run_dir=str(tmp_path / "sweep" / arm), seed=seed) for seed, arm in enumerate("ab")}
    array = plan(recipes, job.cluster, Wishes(), name="sweep", folder=tmp_path, array=True)
    submit.submit(array, "#!/bin/bash\n")
    assert [json.loads(run.jobs.read_text())["job"] for run in array.runs] == ["41_0", "41_1"]
    assert [load(run.launch / "recipe.yaml").recipe.seed for run in array.runs] == [0, 1]
