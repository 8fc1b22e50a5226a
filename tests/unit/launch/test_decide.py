from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardforge.checkpoint import folders
from shardforge.core.rundir import RunDir
from shardforge.launch import decide, history
from shardforge.launch.decide import Limits
from shardforge.launch.ending import Traces
from shardforge.launch.history import Attempt, End

LIMITS = Limits(most=5, without_progress=2)
HERE = Attempt(start="7.0.0", job="7", nodes=("n1", "n2", "n3"), step=100, time=0.0)


def past(start: str, reason: str, *, step: int = 100, to: int = 100, decision: str = "again", **more: Any) -> Attempt:
    """An attempt that ended."""
    job, _, _ = start.split(".")
    outcome = {"lost": "lost", "walltime": "stopped", "SIGTERM": "stopped"}.get(reason.split()[0], "failed")
    end = End(outcome=outcome, step=to, reason=reason, decision=decision and f"{decision} {reason}", **more)
    return Attempt(start=start, job=job, nodes=HERE.nodes, step=step, end=end)


def stopped(reason: str = "", state: str = "stopped", start: str = HERE.start) -> dict[str, Any]:
    return {"state": state, "step": 100, "reason": reason, "start": start}


def failure(message: str = "boom", start: str = HERE.start, **more: Any) -> dict[str, Any]:
    return {"start": start, "code": 1, "step": None, "node": None, "message": message} | more


def line(traces: Traces, *before: Attempt, limits: Limits = LIMITS, here: Attempt = HERE) -> str:
    decision, end = decide.decide([*before, here], here, traces, limits, now=9.0)
    assert end.decision == str(decision) and end.time == 9.0
    return str(decision)


def at(step: int = 100, **seen: Any) -> Traces:
    return Traces(step=step, **({"code": 1, "state": "RUNNING"} | seen))


MUTE = "crash: the step ended with code 1, and no rank said why"
ENDS = {
    "finished": (at(stopped=stopped(state="finished"), code=0), "finished"),
    "finished, whatever torchrun returned": (at(stopped=stopped(state="finished"), code=1), "finished"),
    "finished and asked to stop at once": (at(stopped=stopped(state="finished"), wish="asked by me"), "finished"),
    "the limit of the job": (at(200, stopped=stopped("walltime")), "again walltime"),
    "the limit, told to the ranks by Slurm": (at(200, stopped=stopped("SIGUSR1")), "again walltime (SIGUSR1)"),
    "preempted and saved": (at(stopped=stopped("SIGTERM")), "again SIGTERM"),
    "asked by a person": (at(stopped=stopped("asked by ann")), "stop asked by ann"),
    "an empty STOP file": (at(stopped=stopped("STOP file")), "stop STOP file"),
    "interrupted": (at(stopped=stopped("SIGINT")), "stop SIGINT"),
    "interrupted at once": (at(failure=failure(code=130)), "stop interrupted by a person"),
    "asked, and crashed before it was heard": (at(failure=failure(), wish="asked by ann"), "stop asked by ann"),
    "asked while it stopped for the limit": (at(stopped=stopped("walltime"), wish="asked by ann"), "stop asked by ann"),
    "a mistake": (at(failure=failure("error: no such corpus\n    fix: ...", code=2)), "stop mistake: no such corpus"),
    "a crash": (at(failure=failure("rank 3 (dp1) failed:\nTraceback:\n  x\nValueError: bad")),
                "again crash: rank 3 (dp1) failed: ValueError: bad"),
    "a crash in a step": (at(failure=failure(step=7)), "again crash in step 7: boom"),
    "no rank could say anything": (at(code=137), f"again {MUTE.replace('code 1', 'code 137 (SIGKILL)')}"),
    "nothing said and code 0": (at(code=0), f"again {MUTE.replace('code 1', 'code 0')}"),
    "ranks that were gone": (at(failure=failure("error: /a/run  rank 0 lost contact", blamed=[
        {"rank": 3, "node": "n2", "state": "dead"}, {"rank": 4, "node": "n2", "state": "frozen"},
        {"rank": 5, "node": "n1", "state": "failed"}])),
        "again crash: rank 3 on n2 dead, and 1 more; rank 0 lost contact"),
    "a place that is not only a path": (at(failure=failure("error: step 7  loss is nan", code=2)),
                                        "stop mistake: loss is nan (step 7)"),
    "a node to blame": (at(failure=failure(node="n2")), "exclude n2 crash: boom"),
    "a node to blame that is none of ours": (at(failure=failure(node="login")), "again crash: boom"),
    "a node was lost": (at(lost=("n2",)), "again lost n2"),
    "a node was lost, and a rank noticed": (at(lost=("n2",), failure=failure(step=7)), "again lost n2: boom"),
    "a node that others lost": (at(lost=("n9",)), f"again {MUTE}"),
    "cancelled": (at(state="COMPLETING", code=143), "again ended by Slurm (COMPLETING)"),
    "cancelled, and a rank was left to say so": (at(state="COMPLETING", failure=failure()),
                                                 "again ended by Slurm (COMPLETING)"),
    "a mistake is one whoever ends the job": (at(state="COMPLETING", failure=failure(code=2)), "stop mistake: boom"),
    "preempted in start-up": (at(preempted=True, code=143), "again SIGTERM: preempted before it had saved"),
    "the limit came before a save": (at(wish="walltime"), "again walltime came before the run had saved"),
    "preflight names nodes": (at(phase="preflight", code=3, bad={"n2": "no GPU", "n3": "disk"}),
                              "exclude n2,n3 preflight: n2: no GPU; n3: disk"),
    "preflight cannot be helped": (at(phase="preflight", code=4, fatal=("no data",), bad={"n1": "no data"}),
                                   "stop preflight: no data"),
    "preflight itself failed": (at(phase="preflight", code=3),
                                "again crash: preflight ended with code 3, and no rank said why"),
    "the rest of this job holds the directory": (at(code=2, occupied={"start": "7.0.0", "owner": "6.0.0"}),
                                                 "again occupied: 6.0.0 holds the run directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_each_end_has_its_decision(name):
    traces, expected = ENDS[name]
    assert line(traces) == expected


STALE = {
    "stopped.json of the attempt before": at(stopped=stopped("asked by ann", start="6.0.0")),
    "finished.json of an earlier run": at(stopped=stopped(state="finished", start="7.0.00")),
    "stopped.json that names no start": at(stopped={"state": "stopped", "reason": "walltime", "step": 3}),
    "failure.json of the attempt before": at(failure=failure(code=2, start="7.0.1")),
    "failure.json of a longer name": at(failure=failure(code=2, start="7.0.01")),
    "occupied of the attempt before": at(occupied={"start": "6.0.0", "owner": "5.0.0"}),
}


@pytest.mark.parametrize("name", STALE)
def test_a_file_of_another_start_says_nothing(name):
    assert line(STALE[name]) == f"again {MUTE}"


def test_a_start_is_known_when_ranks_put_more_behind_its_name():
    assert line(at(failure=failure(code=2, start="7.0.0-29500-0"))) == "stop mistake: boom"


CRASH = at(failure=failure())
LIVES = {
    "a first crash before a checkpoint": ([], CRASH, "again"),
    "a second crash without a new checkpoint": ([past("6.0.0", "crash: x")], CRASH, "stop 2 attempts without"),
    "a crash that left a new checkpoint": ([past("6.0.0", "crash: x")], at(101, failure=failure()), "again"),
    "a crash after an attempt that left one": ([past("6.0.0", "crash: x", step=50, to=100)], CRASH, "again"),
    "an older one does not count past a checkpoint": (
        [past("5.0.0", "crash: x", step=50, to=50), past("6.0.0", "walltime", step=50, to=100)], CRASH, "again"),
    "time limits without a step": ([past("6.0.0", "walltime")], at(stopped=stopped("walltime")), "stop 2 attempts"),
    "preemptions are nobody's fault": (
        [past(f"{n}.0.0", "SIGTERM") for n in range(6)], at(stopped=stopped("SIGTERM")), "again"),
    "a lost node is not the run's fault": (
        [past("5.0.0", "crash: x"), past("6.0.0", "lost n1")], at(lost=("n1",)), "again"),
    "an attempt that was lost without an end": ([past("6.0.0", "lost with its node", decision="")], CRASH, "again"),
    "a cancelled one is nobody's fault": ([past("6.0.0", "ended by Slurm")], CRASH, "again"),
    "a sick node found by preflight is nobody's fault": (
        [past("6.0.0", "preflight: n2: disk")], at(phase="preflight", bad={"n3": "disk"}), "exclude n3"),
    "failures are used up": ([past(f"{n}.0.0", "lost n1") for n in range(5)], at(lost=("n1",)), "stop 6 failures"),
    "failures are not used up yet": ([past(f"{n}.0.0", "lost n1") for n in range(4)], at(lost=("n1",)), "again"),
    "progress does not renew failures": (
        [past(f"{n}.0.0", "crash: x", step=n, to=n + 1) for n in range(5)], at(101, failure=failure()), "stop 6"),
    "a chain's time limits are no failures": (
        [past(f"{n}.0.0", "walltime", step=n, to=n + 1) for n in range(9)], at(101, stopped=stopped("walltime")),
        "again"),
    "who starts a stopped run again has looked at it": (
        [past("5.0.0", "crash: x"), past("6.0.0", "crash: x", decision="stop")], CRASH, "again"),
    "what was finished before is another budget": (
        [past("5.0.0", "crash: x"), past("6.0.0", "all steps are done", decision="finished")], CRASH, "again"),
    "the same step twice": (
        [past("6.0.0", "crash in step 117: x", step=50, failed_step=117)],
        at(failure=failure(step=117)), "stop poison: step 117 failed twice; crash in step 117: boom; in 6.0.0 too"),
    "the same step twice, with a checkpoint between": (
        [past("6.0.0", "crash: x", step=50, failed_step=117)], at(110, failure=failure(step=117)), "stop poison"),
    "the same step long ago, before a person looked": (
        [past("6.0.0", "crash: x", failed_step=117, decision="stop")], at(failure=failure(step=117)), "again"),
    "another step": ([past("6.0.0", "crash: x", step=50, failed_step=116)], at(failure=failure(step=117)), "again"),
    "two failures outside of the loop are no poison": (
        [past("6.0.0", "crash: x", step=50, failed_step=None)], at(failure=failure()), "again"),
    "a second node to blame, and nothing done": (
        [past("6.0.0", "crash: x", decision="exclude n1")], at(failure=failure(node="n2")), "stop 2 attempts"),
    "a node whose ranks died twice": (
        [past("6.0.0", "crash: x", step=50, blamed=("n3",))],
        at(101, failure=failure(blamed=[{"rank": 5, "node": "n3", "state": "dead"}])), "exclude n3"),
    "nodes whose ranks died once each": (
        [past("6.0.0", "crash: x", step=50, blamed=("n1",))],
        at(101, failure=failure(blamed=[{"rank": 5, "node": "n3", "state": "dead"}])), "again"),
    "a node that ran an exception twice is no suspect": (
        [past("6.0.0", "crash: x", step=50)],
        at(101, failure=failure(blamed=[{"rank": 5, "node": "n3", "state": "failed"}])), "again"),
    "a living job holds the directory": (
        [replace(past("6.0.0", "x"), end=None)], at(occupied={"start": "7.0.0", "owner": "6.0.0"}),
        "stop occupied: 6.0.0"),
    "two restarts of one job: the earlier one is over": (
        [replace(past("7.9.0", "x"), end=None)], at(occupied={"start": "7.0.0", "owner": "7.9.0"}),
        "again occupied"),
    "an unknown process holds the directory": (
        [], at(occupied={"start": "7.0.0", "owner": "process 3 on x"}), "again occupied"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIVES)
def test_earlier_attempts_count_as_they_should(name):
    before, traces, expected = LIVES[name]
    assert line(traces, *before).startswith(expected)


def test_the_only_node_is_not_excluded_for_ranks_that_died():
    here = replace(HERE, nodes=("n1",))
    dead = failure(blamed=[{"rank": 0, "node": "n1", "state": "dead"}])
    assert line(at(101, failure=dead), past("6.0.0", "crash: x", step=50, blamed=("n1",)), here=here).startswith(
        "again"
    )


@pytest.mark.parametrize(("most", "verb"), [(0, "stop"), (1, "again")])
def test_no_restart_may_be_allowed(most, verb):
    assert line(CRASH, limits=Limits(most, 9)).startswith(verb)


def test_the_end_line_keeps_the_evidence():
    traces = at(110, failure=failure(step=117, blamed=[{"rank": 5, "node": "n3", "state": "frozen"}]))
    _, end = decide.decide([], HERE, traces, LIMITS, now=3.0)
    assert end == End(
        outcome="failed",
        step=110,
        reason="crash in step 117: rank 5 on n3 frozen; boom",
        decision="again crash in step 117: rank 5 on n3 frozen; boom",
        failed_step=117,
        blamed=("n3",),
        time=3.0,
    )


def test_a_long_message_is_one_line_of_bounded_length():
    found = line(at(failure=failure("x\n" * 3 + "y" * 900, code=2)))
    assert found == "stop mistake: x"
    assert len(line(at(failure=failure("word " * 900)))) < 250


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDir:
    """A run directory with an open attempt and a checkpoint of step 100."""
    monkeypatch.setattr(decide, "limits_of", lambda run_dir: LIMITS)
    found = RunDir(tmp_path / "run")
    history.begun(found.attempts, HERE)
    (found.checkpoints / folders.name(100)).mkdir(parents=True)
    (found.checkpoints / folders.name(100) / folders.MARKER).touch()
    return found


def ask(run: RunDir, capsys, *words: str) -> str:
    """The last line that the command prints."""
    code = decide.main([str(run.path), "--start", "7.0.0", "--code", "1", "--nodes", "n1 n2,n3", *words])
    assert code == 0
    return capsys.readouterr().out.splitlines()[-1]


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_command_reads_the_run_directory(run, capsys):
    put(run.failure, failure(node="n2", step=101))
    assert ask(run, capsys) == run.decision.read_text().strip() == "exclude n2 crash in step 101: boom"
    [attempt] = history.read(run.attempts)
    assert (attempt.end.step, attempt.end.decision) == (100, "exclude n2 crash in step 101: boom")


def test_asked_twice_it_says_the_same_and_notes_it_once(run, capsys):
    said = ask(run, capsys)
    before = run.attempts.read_text()
    put(run.failure, failure(code=2))
    assert ask(run, capsys) == said and run.attempts.read_text() == before


def test_a_failed_preflight_is_an_attempt_too(run, capsys):
    put(run.launch / "preflight" / "8.1.0.bad", "n2\tno GPU\n")
    assert decide.main([str(run.path), "--start", "8.1.0", "--phase", "preflight", "--code", "3", "--nodes", "n2"]) == 0
    assert capsys.readouterr().out == "exclude n2 preflight: n2: no GPU\n"
    last = history.read(run.attempts)[-1]
    assert (last.job, last.restart, last.end.outcome) == ("8", 1, "failed")


def test_preflight_says_what_cannot_be_helped(run, capsys):
    put(run.launch / "preflight" / "7.0.0.stop", "the corpus is missing\nthe disk is full\n")
    assert ask(run, capsys, "--phase", "preflight") == "stop preflight: the corpus is missing; the disk is full"


def test_a_stop_file_is_followed_once(run, capsys):
    put(run.stop, "asked by ann\n")
    assert ask(run, capsys) == "stop asked by ann"
    assert not run.stop.exists()


def test_the_wish_of_the_run_that_holds_the_directory_is_left_to_it(run, capsys):
    put(run.stop, "asked by ann\n")
    put(run.occupied("7.0.0"), {"start": "7.0.0", "owner": "process 3 on n1"})
    assert ask(run, capsys) == "again occupied: process 3 on n1 holds the run directory"
    assert run.stop.exists()


def test_a_wish_that_comes_while_it_decides_stays(run):
    put(run.stop, "asked by ann\n")
    decide.forget(run, Traces(step=0, wish="walltime"))
    assert run.stop.exists()


@pytest.mark.parametrize("state", ["COMPLETING", "JobId=7 JobName=a JobState=COMPLETING Reason=None"])
def test_the_state_of_the_job_is_read_from_scontrol(run, capsys, state):
    assert ask(run, capsys, "--state", state) == "again ended by Slurm (COMPLETING)"


@pytest.mark.parametrize(("when", "kind"), [("2026-11-22T21:04:59", "SIGTERM"), ("None", "crash"), ("(null)", "crash")])
def test_a_preemption_is_known_by_its_time(run, capsys, when, kind):
    assert ask(run, capsys, "--state", f"JobState=RUNNING PreemptTime={when}").split()[1].startswith(kind)


def test_what_cannot_be_noted_is_not_tried_again(run, capsys, monkeypatch):
    def fail(path: Path, event: object) -> None:
        raise history.LaunchError("what happened cannot be noted: No space left", path)

    monkeypatch.setattr(history, "append", fail)
    assert ask(run, capsys).startswith("stop ") and "No space left" in run.decision.read_text()


def test_it_starts_without_torch():
    code = "import sys, shardforge.launch.decide, shardforge.launch.attempts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
