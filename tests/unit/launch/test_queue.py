from __future__ import annotations

import subprocess
import time

import pytest

from shardforge.core.errors import LaunchError
from shardforge.launch import queue
from tests.unit.launch.slurm_stand_in import FORGOTTEN, SCONTROL, SQUEUE, Programs, programs


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Programs:
    return programs(tmp_path, monkeypatch)


def test_squeue_is_parsed():
    [job] = [each for each in queue.parse(SQUEUE) if each.id == "2"]
    assert job == queue.Job(
        id="2",
        array="2",
        number="2",
        state="RUNNING",
        nodes=2,
        node_list="node[1-2]",
        partition="main",
        start=time.mktime((2026, 11, 22, 21, 5, 7, 0, 0, -1)),
        end=time.mktime((2026, 11, 22, 21, 15, 7, 0, 0, -1)),
        left_s=599.0,
        limit_s=87000.0,
        user="root",
        name="a|b c",
    )


@pytest.mark.parametrize(
    ("job", "runs", "waits", "held"),
    [
        ("2", True, False, False),
        ("3", False, False, False),
        ("4", False, True, False),
        ("5_[2-4%1]", False, True, False),
        ("6", False, True, True),
        ("7", True, False, False),
        ("9", False, True, True),
    ],
)
def test_a_state_says_whether_a_job_runs_waits_or_is_held(job, runs, waits, held):
    [found] = [each for each in queue.parse(SQUEUE) if each.id == job]
    assert (found.runs, found.waits, found.held) == (runs, waits, held)


def test_a_line_that_is_no_job_is_left_out():
    assert queue.parse("slurm is being updated today\n\n") == []


def test_jobs_are_found_by_the_id_that_was_asked_for(slurm):
    slurm.say("squeue", SQUEUE)
    found = queue.jobs(["2", "5_1", "5_3", "5_9", "8", "77"])
    assert {wanted: job.id for wanted, job in found.items()} == {
        "2": "2",
        "5_1": "5_1",
        "5_3": "5_[2-4%1]",
        "8": "5_1",
    }
    assert slurm.asked() == [f"squeue -h -a -t all -o {queue.FIELDS} -j 2,5,77,8"]


def test_a_job_that_slurm_has_forgotten_is_none(slurm):
    slurm.say("squeue", *FORGOTTEN)
    assert queue.jobs(["2"]) == {}


def test_nothing_is_asked_for_no_jobs(slurm):
    assert queue.jobs([]) == {}


def test_a_thousand_jobs_are_asked_for_in_parts(slurm):
    slurm.say("squeue", SQUEUE)
    assert list(queue.jobs([str(n) for n in range(1000, 1401)] + ["2"])) == ["2"]
    assert len(slurm.asked()) == 3


def test_a_controller_that_is_down_is_said_with_its_words(slurm):
    slurm.say("squeue", "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)", 1)
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        queue.jobs(["2"])


def test_no_slurm_here_is_said(slurm):
    with pytest.raises(LaunchError, match="there is no squeue on this machine"):
        queue.jobs(["2"])


def test_a_controller_that_does_not_answer_is_said(slurm, monkeypatch):
    def late(*words, **more):
        raise subprocess.TimeoutExpired(words, more["timeout"])

    slurm.say("squeue")
    monkeypatch.setattr(subprocess, "run", late)
    with pytest.raises(LaunchError, match="squeue has not answered in 30 s"):
        queue.jobs(["2"])


def test_what_changes_the_output_of_slurm_is_not_passed_on():
    given = {"SQUEUE_FORMAT": "%i", "SQUEUE_STATES": "PD", "SLURM_CONF": "/x", "SLURM_TIME_FORMAT": "relative"}
    assert queue.environment(given) == {"SLURM_CONF": "/x", "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9:58", 598), ("2:03:04", 7384), ("1-02:03:04", 93784), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_durations(text, seconds):
    assert queue.duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "found"), [("3", {3}), ("3-4%1", {3, 4}), ("1,3-4", {1, 3, 4}), ("0-10:5", {0, 5, 10}), ("", set())]
)
def test_elements_of_an_array(text, found):
    assert queue.indices(text) == found


def test_scontrol_is_parsed_with_spaces_in_values(slurm):
    slurm.say("scontrol", SCONTROL)
    [found] = queue.details("2")
    picked = {
        name: found[name] for name in ("JobState", "Restarts", "Command", "Comment", "TRES", "CPUs/Task", "Power")
    }
    assert picked == {
        "JobState": "RUNNING",
        "Restarts": "1",
        "Command": "/runs/S/j.sbatch a b",
        "Comment": "hello world x=1",
        "TRES": "cpu=2,node=2,billing=2",
        "CPUs/Task": "1",
        "Power": "",
    }
    assert slurm.asked() == ["scontrol -o show job 2"]


def test_a_job_that_scontrol_has_forgotten_has_no_details(slurm):
    slurm.say("scontrol", *FORGOTTEN)
    assert queue.details("2") == []


def test_the_accounting_database_is_asked_where_there_is_one(slurm):
    slurm.say("sacct", "2|REQUEUED\n2|COMPLETED\n3|CANCELLED by 0\n44|FAILED\n")
    assert queue.ended(["2", "3", "4"]) == {"2": "COMPLETED", "3": "CANCELLED by 0"}


def test_without_a_database_nothing_is_known_of_the_past(slurm):
    assert queue.ended(["2"]) == {}
    slurm.say("sacct", "", "Slurm accounting storage is disabled", 1)
    assert queue.ended(["2"]) == {}


def test_a_job_is_submitted_and_its_id_comes_back(slurm, tmp_path):
    slurm.say("sbatch", "4711;cluster\n")
    assert queue.submit(tmp_path / "job.sbatch", ["--array=2"]) == "4711"
    assert slurm.asked() == [f"sbatch --parsable --array=2 {tmp_path}/job.sbatch"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: queue.cancel(["4711", "5_3"]), "scancel 4711 5_3"),
        (lambda: queue.requeue("4711"), "scontrol requeue 4711"),
        (lambda: queue.release("4711"), "scontrol release 4711"),
    ],
)
def test_what_slurm_is_asked_to_do_and_its_refusal(slurm, act, words):
    program = words.split()[0]
    slurm.say(program)
    act()
    assert slurm.asked() == [words]
    slurm.say(program, "", "Job is pending execution for job 4711", 1)
    with pytest.raises(LaunchError, match=f"{words}  Job is pending"):
        act()
