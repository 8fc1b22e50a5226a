"""The batch script as a program: what it does with each decision, with stand-ins for Slurm's commands and for Python.

The stand-ins write down what they are asked, and answer from files. tests/slurm does the same with a real Slurm.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.launch import cluster
from shardforge.launch.job import Job, Wishes, plan
from shardforge.launch.sbatch import render
from tests.tiny import tiny

TOOLS = {
    "scontrol": """case $* in
*"show job"*) echo "JobId=7 JobState=$(cat {f}/state) NodeList=$(cat {f}/nodes) EndTime=Unknown ExcNodeList=(null)" ;;
*"show hostnames"*) printf '%s\\n' "${{@: -1}}" | tr ',' '\\n' ;;
*"show node"*) echo "NodeName=$4 NodeAddr=127.0.0.1" ;;
*) echo "scontrol $*" >>{f}/asked ;;
esac""",
    "sinfo": "cat {f}/states 2>/dev/null",
    "squeue": "cat {f}/waiting 2>/dev/null",
    "scancel": 'echo "scancel $*" >>{f}/asked',
    "srun": 'echo "srun $*" >>{f}/asked\nsource {f}/step 2>/dev/null',
    "python": """case $2 in
*attempts) cat {f}/begin ;;
*vigil) source {f}/vigil 2>/dev/null ;;
*decide) echo "decide $*" >>{f}/asked; head -n 1 {f}/decisions; sed -i 1d {f}/decisions ;;
esac""",
}


class Lab:
    """A folder with the stand-ins, and the script of one job in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in TOOLS.items():
            program = folder / "bin" / name
            program.write_text("#!/bin/bash\n" + text.format(f=folder) + "\n")
            program.chmod(0o755)
        self.say(state="RUNNING", nodes="n1,n2", begin="go first")

    def say(self, **answers: str) -> None:
        for name, text in answers.items():
            (self.folder / name).write_text(text + "\n")

    def job(self, *sets: str) -> Job:
        fixed = ["storage.local=[]", "node.ranks=1", f"environment.python={self.folder}/bin/python"]
        sets = sets if any(each.startswith("preflight") for each in sets) else ("preflight=", *sets)
        recipe = tiny(parallel={"dp_shard": 2}, run_dir=str(self.folder / "run"))
        return plan({"tiny": recipe}, cluster.load("cpu", [*fixed, *sets]), Wishes(), name="tiny", folder=self.folder)

    def run(self, job: Job) -> int:
        (self.folder / "run").mkdir()
        env = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
        env |= {"SLURM_JOB_PARTITION": "main", "SLURM_JOB_NAME": "tiny", "SLURM_ARRAY_JOB_ID": "6"}
        env |= {"SLURM_ARRAY_TASK_ID": "1"}
        done = subprocess.run(["bash", "-c", render(job)], env=env, capture_output=True, text=True, timeout=60)
        self.said = done.stdout + done.stderr
        return done.returncode

    def asked(self, word: str) -> list[str]:
        return [line for line in (self.folder / "asked").read_text().splitlines() if line.startswith(word)]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_finished_run_ends_the_job_with_success(lab: Lab):
    lab.say(decisions="finished")
    assert lab.run(lab.job()) == 0 and lab.asked("scontrol") == []


def test_the_step_runs_on_the_nodes_of_the_job_one_rank_a_task(lab: Lab):
    lab.say(decisions="finished")
    lab.run(lab.job())
    (step,) = lab.asked("srun")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in step.replace('"', "") and "--nodelist=n1,n2" in step
    assert "--kill-on-bad-exit=1" in step


def test_a_stop_ends_the_job_with_an_error_and_without_a_requeue(lab: Lab):
    lab.say(decisions="stop the same step failed twice")
    assert lab.run(lab.job()) == 1 and lab.asked("scontrol") == []


def test_no_decision_at_all_ends_the_job_with_an_error(lab: Lab):
    lab.say(decisions="")
    assert lab.run(lab.job()) == 1 and lab.asked("scontrol") == []


def test_a_start_that_may_not_begin_starts_no_rank(lab: Lab):
    lab.say(begin="stop asked by ada")
    lab.say(decisions="finished")
    assert lab.run(lab.job()) == 1 and "begin: stop asked by ada" in lab.said and not (lab.folder / "asked").exists()


@pytest.mark.parametrize("reason", ["walltime", "SIGTERM"])
def test_a_run_that_saved_for_slurm_comes_back_through_the_queue(lab: Lab, reason: str):
    lab.say(decisions=f"again {reason}")
    assert lab.run(lab.job()) == 0 and lab.asked("scontrol") == ["scontrol requeue 7"]


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
def test_a_job_about_which_slurm_has_decided_is_left_alone(lab: Lab, state: str):
    lab.say(decisions="again crash", state=state)
    lab.run(lab.job())
    assert lab.asked("scontrol") == [] and len(lab.asked("srun")) == 1


def test_a_crash_is_tried_again_inside_of_the_job_and_then_through_the_queue(lab: Lab):
    lab.say(decisions="again crash\nagain crash")
    lab.run(lab.job())
    assert len(lab.asked("srun")) == 2 and lab.asked("scontrol") == ["scontrol requeue 7"]


def test_each_try_has_a_start_of_its_own(lab: Lab):
    lab.say(decisions="again crash\nfinished")
    lab.run(lab.job())
    starts = [line.split("--start ")[1].split()[0] for line in lab.asked("decide")]
    assert starts == ["7.0.1", "7.0.2"]


def test_an_excluded_node_is_excluded_from_the_requeued_job(lab: Lab):
    lab.say(decisions="exclude n2 rank 1 froze", states="n1\nn2\nn3\nn4")
    lab.run(lab.job())
    assert lab.asked("scontrol") == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n2"]


def test_a_partition_that_is_too_small_keeps_the_bad_node(lab: Lab):
    lab.say(decisions="exclude n2 rank 1 froze", states="n1\nn2")
    lab.run(lab.job())
    assert lab.asked("scontrol") == ["scontrol requeue 7"] and "they stay in" in lab.said


def test_a_spare_takes_the_place_of_an_excluded_node_without_the_queue(lab: Lab):
    lab.say(decisions="exclude n1 rank 0 froze\nfinished", nodes="n1,n2,n3")
    assert lab.run(lab.job("queue.spares=1")) == 0
    first, second = lab.asked("srun")
    assert "--nodelist=n1,n2" in first and "--nodelist=n2,n3" in second and lab.asked("scontrol") == []


def test_a_node_that_went_down_is_told_and_not_used_again(lab: Lab):
    lab.say(decisions="again lost n2 went down\nfinished", nodes="n1,n2,n3")
    lab.say(step=f"echo 'n2 down*' >{lab.folder}/states; (exit 143)")
    lab.run(lab.job("queue.spares=1"))
    assert "--nodelist=n1,n3" in lab.asked("srun")[1] and "--lost n2" in lab.asked("decide")[0]


def test_a_node_that_slurm_took_away_is_told_even_when_sinfo_says_nothing(lab: Lab):
    lab.say(decisions="again lost n2 went down\nfinished", nodes="n1,n2,n3")
    lab.say(step=f"echo n1,n3 >{lab.folder}/nodes; (exit 143)")
    lab.run(lab.job("queue.spares=1"))
    assert "--nodelist=n1,n3" in lab.asked("srun")[1] and "--lost n2" in lab.asked("decide")[0]


def test_the_time_limit_becomes_the_stop_file_and_a_requeue(lab: Lab):
    lab.say(decisions="again walltime", step='kill -USR1 "$PPID"')
    assert lab.run(lab.job()) == 0
    assert (lab.folder / "run" / "STOP").read_text() == "walltime\n" and lab.asked("scontrol") == ["scontrol requeue 7"]


def test_a_wish_to_stop_is_not_overwritten_by_the_time_limit(lab: Lab):
    lab.say(decisions="stop asked by ada", step=f"echo asked by ada >{lab.folder}/run/STOP; kill -USR1 $PPID")
    lab.run(lab.job())
    assert (lab.folder / "run" / "STOP").read_text() == "asked by ada\n"


def test_the_shell_outlives_term_and_tells_how_the_step_ended(lab: Lab):
    lab.say(decisions="finished", step='kill -TERM "$PPID"; (exit 9)')
    lab.run(lab.job())
    assert "--code 9" in lab.asked("decide")[0]


def test_a_step_that_hangs_after_the_verdict_is_ended(lab: Lab):
    lab.say(decisions="stop a hang", step="exec sleep 50")
    lab.say(vigil=f"""echo '{{"start": "7.0.1"}}' >{lab.folder}/run/failure.json; exit 1""")
    assert lab.run(lab.job()) == 1 and "--code 143" in lab.asked("decide")[0]


def test_a_watch_that_fails_itself_ends_no_step(lab: Lab):
    lab.say(decisions="finished", step="sleep 3; exit 7", vigil="exit 1")
    lab.run(lab.job())
    assert "--code 7" in lab.asked("decide")[0]


def test_in_a_chain_the_next_job_goes_on_after_the_time_limit(lab: Lab):
    lab.say(decisions="again walltime", waiting="8")
    assert lab.run(replace(lab.job(), chained=True)) == 0 and lab.asked("scontrol") == []


def test_the_last_job_of_a_chain_comes_back_until_the_budget_is_reached(lab: Lab):
    lab.say(decisions="again walltime")
    lab.run(replace(lab.job(), chained=True))
    assert lab.asked("scontrol") == ["scontrol requeue 7"]


@pytest.mark.parametrize("decision", ["finished", "stop by hand"])
def test_the_end_of_the_run_cancels_what_waits_of_its_chain(lab: Lab, decision: str):
    lab.say(decisions=decision)
    lab.run(replace(lab.job(), chained=True))
    (line,) = lab.asked("scancel")
    assert "--name=tiny --state=PENDING" in line


def test_an_element_of_an_array_has_its_own_run_and_its_own_number(lab: Lab):
    lab.say(decisions="again walltime")
    one = lab.job()
    other = replace(one.recipe, run_dir=str(lab.folder / "run" / "b"))
    lab.run(replace(one, array=True, recipes={"a": one.recipe, "b": other}))
    assert lab.asked("scontrol") == ["scontrol requeue 6_1"]
    assert "decision: again walltime" in (lab.folder / "run" / "b" / "launch" / "logs" / "job-7.log").read_text()


CHECK = """case $* in *preflight*)
printf '%s\\n' {good} >{f}/run/launch/preflight/7.0.1.nodes
printf 'n1\\tno disk\\n' >{f}/run/launch/preflight/7.0.1.bad
echo {code} >{f}/run/launch/preflight/7.0.1.code ;;
esac"""


def test_a_node_that_the_preflight_calls_bad_is_replaced_by_a_spare(lab: Lab):
    step = CHECK.format(f=lab.folder, good="n2 n3", code=0)
    lab.say(decisions="finished", nodes="n1,n2,n3", step=step)
    assert lab.run(lab.job("queue.spares=1", "preflight.share=0.0")) == 0
    check, step = lab.asked("srun")
    assert "--nodelist=n1,n2,n3" in check and "--nodelist=n2,n3" in step and "preflight: n1: no disk" in lab.said


def test_too_few_good_nodes_start_no_rank_and_leave_the_bad_ones_behind(lab: Lab):
    step = CHECK.format(f=lab.folder, good="n2", code=3)
    lab.say(decisions="exclude n1 preflight: no disk", states="n1\nn2\nn3\nn4", step=step)
    lab.run(lab.job("preflight.share=0.0"))
    assert len(lab.asked("srun")) == 1 and "--phase preflight --code 3" in lab.asked("decide")[0]
    assert lab.asked("scontrol") == ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n1"]


def test_a_preflight_that_leaves_no_word_is_a_failed_one(lab: Lab):
    lab.say(decisions="stop preflight", step="exit 1")
    assert lab.run(lab.job("preflight.share=0.0")) == 1 and "--phase preflight --code 3" in lab.asked("decide")[0]


def test_torchrun_is_started_once_a_node_and_leaves_term_to_the_ranks(lab: Lab):
    lab.say(decisions="finished")
    lab.run(replace(lab.job(), style="torchrun"))
    text = (lab.folder / "asked").read_text()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in text
    assert 'trap "" TERM' in text and "torch.distributed.run --nnodes=2 --nproc-per-node=1" in text
