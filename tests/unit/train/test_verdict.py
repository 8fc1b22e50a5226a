from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from shardforge.core.layout import Layout
from shardforge.train.place import Place, ranges
from shardforge.train.verdict import Pulse, Scene, Standing, axes, end_frozen, named, spot, standing, verdict

DP2_TP2 = Layout(dp_shard=2, tp=2)
TP, DP = "mesh_tp", "mesh_dp_shard"
HERE = Path("run")


def pulse(rank: int, place: Place | None = None, idle: float = 600.0) -> Pulse:
    return Pulse(rank, "far", 1000 + rank, 0.0, 7, idle, place or Place(line="data/loader.py:131 in batch"))


def waits(rank: int, operation: str, group: str, *members: int, **details) -> Standing:
    found = Place(operation, group, ranges(members), line="nn/collectives.py:50 in _summed", **details)
    return Standing(rank, pulse(rank, found))


def alive(rank: int) -> Standing:
    return Standing(rank, pulse(rank))


def scene(*ranks: Standing, here: int = 0, layout: Layout = DP2_TP2) -> Scene:
    return Scene(layout, here, "waited 600 s in", {each.rank: each for each in ranks})


DEAD = Standing(3, pulse(3), "dead", "process 1003 on far is gone")


def test_the_rank_that_waits_the_collective_and_the_missing_rank_are_named():
    half = waits(2, "reduce_scatter", TP, 2, 3, unit="block 3", part="backward", step=17)
    others = waits(0, "all_reduce", TP, 0, 1), waits(1, "all_reduce", TP, 0, 1)
    told = str(verdict(scene(*others, half, DEAD, here=2), HERE))
    assert told.startswith(
        "run  rank 2 (dp1 tp0) waited 600 s in reduce_scatter over tp of block 3 in backward of step 17 at "
        "nn/collectives.py:50 in _summed, for rank 3 (dp1 tp1)\n  rank 3 (dp1 tp1) is dead: process 1003 on far is gone"
    )


def test_whoever_speaks_names_the_collective_in_which_the_cause_is_missing():
    ranks = [
        waits(0, "all_reduce", DP, 0, 2),
        waits(1, "all_gather", TP, 0, 1),
        waits(2, "all_gather", TP, 2, 3),
        DEAD,
    ]
    for here in (0, 1, 2):
        told = str(verdict(scene(*ranks, here=here), HERE)).splitlines()
        assert "rank 2 (dp1 tp0) waited 600 s in all_gather over tp" in told[0] and told[0].endswith(
            "for rank 3 (dp1 tp1)"
        )


def test_ranks_that_wait_behind_are_told_in_one_line():
    ranks = waits(0, "all_reduce", DP, 0, 2), alive(1), waits(2, "all_gather", TP, 2, 3), DEAD
    told = str(verdict(scene(*ranks), HERE))
    assert "rank 0 (dp0 tp0) waits behind them in all_reduce over dp" in told


@pytest.mark.parametrize(
    ("missing", "told", "fix"),
    [
        (DEAD, "is dead: process 1003 on far is gone", "memory, a signal, its node"),
        (Standing(3, pulse(3), "frozen", "no sign of life"), "is frozen: no sign of life", "its node"),
        (alive(3), "is elsewhere: for 600 s in data/loader.py:131 in batch", "raise train.timeout"),
        (waits(3, "broadcast", TP, 2, 3), "is in another collective: for 600 s in broadcast over tp", "same calls"),
        (Standing(3, None, "frozen", "never came"), "is frozen: never came", "its node"),
    ],
    ids=["dead", "frozen", "elsewhere", "other collective", "never seen"],
)
def test_each_missing_rank_is_told_with_its_state_and_what_to_do(missing, told, fix):
    found = str(verdict(scene(alive(0), alive(1), waits(2, "all_gather", TP, 2, 3), missing, here=2), HERE))
    assert f"rank 3 (dp1 tp1) {told}" in found and fix in found.splitlines()[-1]


def test_ranks_in_the_same_collective_are_told_with_their_lines_and_counts():
    ranks = [waits(rank, "all_reduce", "default_pg", 0, 1, call=40 + rank) for rank in (0, 1)]
    told = str(verdict(scene(*ranks, layout=Layout(tp=2)), HERE))
    assert "(its call 40)" in told and "rank 1 (tp1) is there too" in told and "(its call 41)" in told


def test_when_nobody_waits_in_a_collective_every_place_is_told():
    told = str(verdict(scene(alive(0), alive(1), layout=Layout(tp=2)), HERE))
    assert "rank 0 (tp0) waited 600 s in data/loader.py:131" in told and "rank 1 (tp1) is elsewhere" in told


def test_without_the_store_the_own_collective_is_told():
    own = replace(scene(waits(0, "all_reduce", TP, 0, 1)), lost_store="nothing is known: the launcher is gone")
    told = str(verdict(own, HERE))
    assert "all_reduce over tp" in told and "the launcher is gone" in told


def test_of_thousands_of_missing_ranks_a_few_are_shown():
    layout = Layout(dp_shard=2048)
    ranks = [waits(0, "all_reduce", "", *range(2048)), *(Standing(rank, None, "dead", "x") for rank in range(1, 2048))]
    told = str(verdict(scene(*ranks, layout=layout), HERE))
    assert "and 2039 more" in told and len(told.splitlines()) < 15


@pytest.mark.parametrize(
    ("group", "members", "name"),
    [
        ("mesh_tp", (0, 1), "tp"),
        ("mesh_data", (0, 2), "dp"),
        ("undefined", (1, 3), "dp"),
        ("default_pg", (0, 1, 2, 3), "all ranks"),
        ("undefined", (0, 3), "ranks 0, 3"),
        ("mesh_efsdp", (0, 3), "efsdp"),
    ],
)
def test_a_group_is_named_by_what_its_members_differ_in(group, members, name):
    assert axes(DP2_TP2, Place("all_reduce", group, ranges(members))) == name


@pytest.mark.parametrize(
    ("layout", "rank", "told"),
    [(Layout(), 0, "alone"), (Layout(tp=2), 1, "tp1"), (DP2_TP2, 2, "dp1 tp0"), (Layout(dp_replicate=2), 1, "rep1")],
    ids=str,
)
def test_a_rank_is_told_by_its_place_along_the_axes_that_split_something(layout, rank, told):
    assert spot(layout, rank) == told


def test_ranks_are_listed_as_in_a_sentence():
    assert named(DP2_TP2, [0, 1, 2]) == "rank 0 (dp0 tp0), rank 1 (dp0 tp1) and rank 2 (dp1 tp0)"


@pytest.fixture
def neighbour():
    """Another process of this machine, and its pulse."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = psutil.Process(process.pid).create_time()
    yield process, Pulse(1, "near", process.pid, born, 7, 0.0, Place())
    process.kill()
    process.communicate()


def test_a_rank_whose_pulse_goes_on_is_alive(neighbour):
    _, said = neighbour
    assert standing(1, said, replace(said, count=8), "near").state == "alive"


def test_a_rank_of_this_machine_is_dead_when_its_process_is(neighbour):
    process, said = neighbour
    process.kill()
    process.wait()
    assert standing(1, said, replace(said, count=8), "near").state == "dead"


def test_a_process_that_was_given_the_same_number_is_another(neighbour):
    _, said = neighbour
    assert standing(1, said, replace(said, born=said.born - 100), "near").state == "dead"


def test_a_rank_that_was_stopped_is_frozen(neighbour):
    process, said = neighbour
    process.send_signal(signal.SIGSTOP)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        pass
    found = standing(1, said, said, "near")
    assert (found.state, "stopped by a signal" in found.words) == ("frozen", True)


def test_a_rank_of_another_machine_is_frozen_when_its_pulse_stands():
    assert standing(3, pulse(3), pulse(3), "near").state == "frozen"


def test_a_rank_of_another_machine_that_closed_a_connection_is_dead_and_its_node_is_not():
    found = standing(3, pulse(3), pulse(3), "near", closed=True)
    assert (found.state, "a connection was closed" in found.words) == ("dead", True)


def test_a_rank_that_said_goodbye_is_gone_and_not_frozen():
    found = standing(3, pulse(3), replace(pulse(3), left=True), "near")
    assert (found.state, "has finished" in found.words) == ("dead", True)


def test_a_frozen_rank_of_this_machine_is_ended(neighbour):
    process, said = neighbour
    end_frozen([Standing(1, said, "frozen")], "near")
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("state", "host"), [("alive", "near"), ("frozen", "elsewhere")])
def test_no_other_process_is_ended(neighbour, state, host):
    process, said = neighbour
    end_frozen([Standing(1, said, state)], host)
    assert process.poll() is None and os.getpid() != process.pid
