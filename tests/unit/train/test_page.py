from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shardforge.core.layout import Layout
from shardforge.train import page
from shardforge.train.failure import Blamed, Failure
from shardforge.train.place import Place, ranges
from shardforge.train.verdict import STOPPED, Pulse, Scene, Standing

DP4 = Layout(dp_shard=4)
ELSEWHERE = Place(line="data/loader.py:131 in batch", part="reading data", step=17)
WAITING = Place("all_reduce", "mesh_dp_shard", ranges((0, 1, 2, 3)), step=17, line="optim/clip.py:44 in global_norm")


def pulse(rank: int, place: Place = WAITING) -> Pulse:
    return Pulse(rank, f"host{rank}", 1000 + rank, 0.0, 7, 600.0, place, node=f"node{rank // 2}")


def waits(rank: int) -> Standing:
    return Standing(rank, pulse(rank))


def scene(*ranks: Standing, layout: Layout = DP4) -> Scene:
    return Scene(layout, 0, "waited 600 s in", {each.rank: each for each in ranks})


def failure(found: Scene, stacks: dict[int, str] | None = None) -> Failure:
    return page.failure(found, Path("run"), stacks or {}, "12.0.1")


FROZEN = Standing(3, pulse(3), "frozen", "no sign of life from process 1003 on host3")
STATES = {
    "dead": Standing(3, pulse(3), "dead", "process 1003 on host3 is gone"),
    "frozen": FROZEN,
    "hang": Standing(3, pulse(3, ELSEWHERE)),
    "order": Standing(3, pulse(3, replace(WAITING, operation="broadcast"))),
}


@pytest.mark.parametrize("cause", STATES)
def test_the_cause_is_the_state_of_the_rank_that_is_waited_for(cause):
    assert failure(scene(waits(0), waits(1), waits(2), STATES[cause])).cause == cause


@pytest.mark.parametrize(
    ("cause", "state"), [("dead", "dead"), ("frozen", "frozen"), ("hang", "elsewhere"), ("order", "astray")]
)
def test_whom_the_others_wait_for_is_blamed_with_its_node(cause, state):
    assert failure(scene(waits(0), waits(1), waits(2), STATES[cause])).blamed == (Blamed(3, "node1", state),)


def test_the_step_is_the_one_in_which_the_others_wait():
    assert failure(scene(waits(0), waits(1), waits(2), FROZEN)).step == 17


def test_silence_speaks_against_the_node():
    assert failure(scene(waits(0), waits(1), waits(2), FROZEN)).node == "node1"


def test_all_silent_ranks_of_one_node_speak_against_it():
    other = Standing(2, pulse(2), "frozen", "no sign of life from process 1002 on host2")
    assert failure(scene(waits(0), waits(1), other, FROZEN)).node == "node1"


@pytest.mark.parametrize(
    "ranks",
    [
        (waits(0), waits(1), waits(2), STATES["dead"]),
        (waits(0), waits(1), waits(2), STATES["hang"]),
        (waits(0), waits(1), waits(2), replace(FROZEN, words=f"process 1003 on host3 {STOPPED}")),
        (waits(0), Standing(1, pulse(1), "frozen", "no sign"), waits(2), FROZEN),
        (waits(0), waits(1), waits(2), Standing(3, None, "frozen", "it has never given a sign of life")),
    ],
    ids=["a process ended", "a living rank", "stopped by a signal", "silence on two nodes", "never came"],
)
def test_nothing_else_speaks_against_a_node(ranks):
    assert failure(scene(*ranks)).node is None


def test_without_the_store_nobody_is_blamed():
    found = failure(replace(scene(waits(0)), lost_store="nothing is known: the launcher is gone"))
    assert (found.cause, found.blamed, found.node) == ("lost", (), None)


def test_a_rank_that_waits_for_nobody_blames_itself():
    found = failure(scene(Standing(0, pulse(0, ELSEWHERE)), layout=Layout()))
    assert (found.cause, found.blamed) == ("hang", (Blamed(0, "node0", "elsewhere"),))


def test_the_table_has_every_rank_with_node_state_and_place_the_blamed_first():
    lines = failure(scene(waits(0), waits(1), waits(2), STATES["hang"])).page.splitlines()
    head = next(at for at, line in enumerate(lines) if line.startswith("rank "))
    rows = [line.split() for line in lines[head + 1 : head + 5]]
    assert [row[:6] for row in rows] == [
        ["3", "dp3", "node1", "1003", "alive", "600"],
        ["0", "dp0", "node0", "1000", "waits", "600"],
        ["1", "dp1", "node0", "1001", "waits", "600"],
        ["2", "dp2", "node1", "1002", "waits", "600"],
    ]
    assert "data/loader.py:131 in batch in reading data of step 17" in lines[head + 1]
    assert "all_reduce over dp in step 17" in lines[head + 2]


def test_the_page_says_which_start_it_is_of():
    assert "start 12.0.1, " in failure(scene(waits(0), waits(1), waits(2), FROZEN)).page


def test_equal_stacks_stand_once_and_a_missing_one_is_named():
    text = failure(scene(waits(0), waits(1), waits(2), FROZEN), {0: "in a", 1: "in a", 2: "in b"}).page
    assert "stack of rank 0 (dp0) and rank 1 (dp1)\nin a\n" in text and "stack of rank 2 (dp2)\nin b\n" in text
    assert text.count("in a\n") == 1 and "no stack of rank 3 (dp3)" in text


def test_of_thousands_of_ranks_the_page_stays_readable():
    layout = Layout(dp_shard=4096)
    everyone = tuple(range(4096))
    there = replace(WAITING, runs=ranges(everyone))
    ranks = [Standing(rank, pulse(rank, there)) for rank in everyone[:-1]]
    last = Standing(4095, pulse(4095), "dead", "it is gone")
    text = failure(scene(*ranks, last, layout=layout), {rank: f"in {rank % 100}" for rank in everyone}).page
    assert "and 3840 more" in text and "and 68 more stacks" in text and len(text.splitlines()) < 400
