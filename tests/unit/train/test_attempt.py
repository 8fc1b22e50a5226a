from __future__ import annotations

import json

import pytest

from shardforge.core.rundir import RunDir
from shardforge.train import attempt

SLURM = {"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "node[1-4]"}


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def test_a_first_start_outside_of_a_scheduler_has_nothing_to_say(run_dir):
    assert attempt.facts(run_dir, {}) == {}


def test_job_restart_nodes_and_reason_are_what_the_scheduler_and_the_launcher_say(run_dir):
    told = attempt.facts(run_dir, SLURM | {"SHARDFORGE_START": "123.2.1", "SHARDFORGE_REASON": "node2 went down"})
    assert told == {
        "start": "123.2.1",
        "job": "123",
        "restart": 2,
        "nodes": "node[1-4]",
        "reason": "node2 went down",
    }


def test_a_job_that_was_never_requeued_is_restart_0(run_dir):
    assert attempt.facts(run_dir, {"SLURM_JOB_ID": "123"})["restart"] == 0


def test_the_nodes_are_those_of_the_step_and_not_the_spare_ones(run_dir):
    assert attempt.facts(run_dir, SLURM | {"SLURM_STEP_NODELIST": "node[1-3]"})["nodes"] == "node[1-3]"


def test_an_element_of_an_array_is_named_as_commands_take_it(run_dir):
    array = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3"}
    assert attempt.facts(run_dir, SLURM | array)["job"] == "120_3"


@pytest.mark.parametrize(
    ("file", "said", "reason"),
    [
        ("stopped.json", {"state": "stopped", "step": 5, "reason": "walltime"}, "walltime"),
        ("stopped.json", {"state": "finished", "step": 5, "reason": ""}, "finished"),
        ("failure.json", {"cause": "dead", "message": "error: rank 3 is dead\n  more"}, "dead: error: rank 3 is dead"),
        ("failure.json", {"message": "an older version"}, "failed: an older version"),
        ("metrics.jsonl", {}, "it ended without a word"),
        ("failure.json", [], ""),
    ],
)
def test_without_a_launcher_the_files_of_the_life_before_say_why(run_dir, file, said, reason):
    (run_dir.path / file).write_text(json.dumps(said))
    assert attempt.facts(run_dir, {}).get("reason", "") == reason


def test_what_the_launcher_says_goes_before_the_files(run_dir):
    run_dir.failure.write_text(json.dumps({"message": "error: x", "cause": "dead"}))
    assert attempt.facts(run_dir, {"SHARDFORGE_REASON": "lost node2"})["reason"] == "lost node2"


def test_a_torn_file_says_nothing(run_dir):
    run_dir.stopped.write_text('{"state": "sto')
    assert attempt.earlier(run_dir) == ""
