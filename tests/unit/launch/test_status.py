from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.launch import status
from shardforge.launch.history import Attempt, End
from shardforge.launch.overview import Overview
from shardforge.launch.pace import Pace
from shardforge.launch.queue import Job
from shardforge.observe.base import StepReport
from shardforge.observe.throughput import Throughput

NOW = 1_000_000.0
STEP = StepReport(
    step=12345, steps=100000, loss=2.4321, tokens=4_194_304, tokens_seen=51_778_682_880, seconds=3.41, grad_norm=1.0
)
JOB = Job(
    id="4711", array="4711", number="4711", state="RUNNING", nodes=4, node_list="node[1-4]", partition="main",
    left_s=11520.0, limit_s=86400.0,
)  # fmt: skip
NEXT = Job(
    id="4712", array="4712", number="4712", state="PENDING", nodes=4, partition="main", reason="Dependency",
    dependency="singleton(unfulfilled)", start=NOW + 11520,
)  # fmt: skip
LOST = End(outcome="lost", step=12000, reason="lost node2", decision="again lost node2", time=NOW - 7500)
SEEN = Overview(
    path=Path("runs/8b"),
    state="running",
    jobs=(JOB, NEXT),
    excluded="node9",
    owner="process 17 on node1",
    layout="dp32",
    device="32 x NVIDIA H100",
    pace=Pace(NOW - 4, STEP, Throughput().add(STEP)),
    saved=12000,
    saved_at=NOW - 730,
    attempts=(
        Attempt(start="4710.0.0", job="4710", step=0, reason="first", time=NOW - 90000),
        Attempt(start="4711.0.0", job="4711", step=9000, reason="walltime", time=NOW - 80000),
        Attempt(start="4711.1.0", job="4711", step=12000, reason="lost node2", time=NOW - 7400),
    ),
    verdict="ranks 8 to 15 are dead, and " + "everybody waited for them " * 4,
    verdict_at=NOW - 7500,
    verdict_page=Path("runs/8b/verdict.txt"),
)


def test_a_page_has_all_that_is_known_in_80_columns():
    clock = status._clock(NOW + 3.41 * 87655)
    assert status.page(SEEN, NOW) == [
        "runs/8b: running",
        "  process     17 on node1",
        "  jobs        4711 RUNNING on 4 nodes (node[1-4]), main, 3h12m left of 1d00h",
        "              4712 PENDING for 4 nodes, main: Dependency after",
        "              singleton(unfulfilled), expected in 3h12m",
        "  without     node9",
        "  layout      dp32 on 32 x NVIDIA H100",
        "  step        12345 of 100000 (12.3%), 51.8G tokens, loss 2.4321, 4 s ago",
        f"  speed       1.23M tokens/s, 3.41 s a step; 3d11h left, until {clock}",
        "  checkpoint  step 12000, 12m10s ago",
        "  restarts    2: 1 walltime, 1 lost",
        "              22h13m ago, 4711.0.0: walltime",
        "              2h03m ago, 4711.1.0: lost node2",
        "  verdict     2h05m ago: ranks 8 to 15 are dead, and everybody waited for them",
        "              everybody waited for them everybody waited for them everybody",
        "              waited for them ; all of it is in runs/8b/verdict.txt",
    ]


@pytest.mark.parametrize("many", [1, 30])
def test_no_line_is_wider_than_80_columns(many):
    long = replace(SEEN, path=Path("runs/" + "deep/" * 20), why="a reason " * 20, jobs=SEEN.jobs * many)
    assert max(map(len, [*status.page(replace(long, attempts=SEEN.attempts * many), NOW)])) <= 80
    assert max(map(len, status.table([long, SEEN], NOW))) <= 80


def test_a_run_that_has_made_no_step_says_so():
    page = status.page(Overview(path=Path("a"), state="starting", why="preflight", pace=Pace(NOW - 3)), NOW)
    assert page == ["a: starting (preflight)", "  step        none yet; last news 3 s ago", "  checkpoint  none yet"]


def test_a_run_that_stands_still_has_no_hour_at_which_it_ends():
    lines = status.page(replace(SEEN, state="requeued"), NOW)
    assert "  speed       1.23M tokens/s, 3.41 s a step; 3d11h left at that speed" in lines


def test_a_table_has_a_line_for_each_run():
    new = Overview(path=Path("runs/new"), state="queued")
    assert status.table([SEEN, new], NOW) == [
        "run       state     step  done  tokens/s   left  restarts  news",
        "runs/8b   running  12345   12%     1.23M  3d11h         2   4 s",
        "runs/new  queued       -     -         -      -         0     -",
    ]


def test_restarts_of_a_run_without_slurm_are_its_starts():
    alone = replace(SEEN, attempts=(), starts=3)
    assert "  restarts    2" in status.page(alone, NOW)
    assert status.table([alone], NOW)[1].split()[-3:] == ["2", "4", "s"]


def test_news_of_this_second_are_now():
    assert status.table([replace(SEEN, pace=replace(SEEN.pace, news=NOW))], NOW)[1].split()[-1] == "now"


def test_json_has_the_numbers_and_null_for_what_is_none():
    odd = replace(SEEN, pace=Pace(NOW, replace(STEP, loss=math.nan), SEEN.pace.rates))
    [first, second] = json.loads(status.as_json([odd, Overview(path=Path("b"), state="new")]))
    assert (first["run"], first["loss"], first["step"], first["checkpoint"]["step"]) == ("runs/8b", None, 12345, 12000)
    assert (first["jobs"][0]["id"], first["attempts"][2]["reason"]) == ("4711", "lost node2")
    assert (second["step"], second["jobs"], second["verdict"]["text"]) == (None, [], "")
