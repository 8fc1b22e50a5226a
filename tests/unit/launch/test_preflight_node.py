from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest

from shardforge.launch import preflight_node
from shardforge.launch.preflight_config import PreflightConfig
from shardforge.launch.preflight_node import Lanes, Node
from shardforge.launch.preflight_wanted import Wanted

SOON_S, LONG_S = 1.5, 60.0
ECHO = """
import json, os, sys, time
for line in sys.stdin:
    told = json.loads(line)
    if told == "die": os._exit(7)
    if told == "hang": time.sleep(600)
    print(json.dumps({"lane": sys.argv[1], "device": sys.argv[2], "told": told, "pid": os.getpid()}), flush=True)
"""
ALONE = {"address": "127.0.0.1", "rank": 0, "size": 1, "key": "k", "bytes": 1 << 20, "timeout_s": 30.0}


@pytest.fixture
def lanes() -> Iterator[Callable[[int], Lanes]]:
    """Lanes whose processes repeat what they are told, without torch."""
    made: list[Lanes] = []

    def make(count: int) -> Lanes:
        made.append(Lanes(count, False, (sys.executable, "-S", "-c", ECHO)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_each_lane_answers_its_own_question(lanes):
    answers = lanes(3).ask(["a", "b", "c"], LONG_S)
    assert [(each["lane"], each["told"], each["device"]) for each in answers] == [
        ("0", "a", "cpu"), ("1", "b", "cpu"), ("2", "c", "cpu"),
    ]  # fmt: skip


def test_fewer_questions_than_lanes_ask_the_first(lanes):
    assert [each["lane"] for each in lanes(3).ask(["a"], LONG_S)] == ["0"]


def test_a_lane_keeps_its_process(lanes):
    asked = lanes(1)
    assert asked.ask(["a"], LONG_S)[0]["pid"] == asked.ask(["b"], LONG_S)[0]["pid"]


def test_a_lane_that_hangs_is_ended_and_the_others_answer(lanes):
    asked = lanes(2)
    asked.ask(["a", "a"], LONG_S)
    told = asked.ask(["hang", "b"], SOON_S)
    assert told[0] == {"error": "no answer in 1.5 s"} and told[1]["told"] == "b"


def test_a_lane_that_hung_is_replaced_when_it_is_asked_again(lanes):
    asked = lanes(1)
    before = asked.ask(["a"], LONG_S)[0]["pid"]
    asked.ask(["hang"], SOON_S)
    assert asked.ask(["a"], LONG_S)[0]["pid"] != before


def test_a_lane_that_dies_is_said_with_its_code_and_replaced(lanes):
    asked = lanes(1)
    assert asked.ask(["die"], LONG_S) == [{"error": "the process ended with code 7"}]
    assert asked.ask(["a"], LONG_S)[0]["told"] == "a"


def test_no_process_outlives_its_lanes(lanes):
    asked = lanes(2)
    pids = [each["pid"] for each in asked.ask(["a", "a"], LONG_S)]
    asked.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Wanted(nodes=1, gpus=8), 8),
        (Wanted(nodes=4), 1),
        (Wanted(nodes=1), 0),
        (Wanted(nodes=4, config=PreflightConfig(share=0.0)), 0),
        (Wanted(nodes=4, config=PreflightConfig(share=0.0, pair_gb_s=1.0)), 1),
        (Wanted(nodes=4, gpus=8, config=PreflightConfig(share=0.0)), 8),
        (Wanted(nodes=4, gpus=8, config=PreflightConfig(gpus="unchecked")), 1),
    ],
)
def test_a_node_has_a_lane_for_each_gpu_or_one_where_something_is_measured(wanted, count):
    assert preflight_node.lanes(wanted) == count


def test_a_node_answers_facts_after_it_was_told_what_is_wanted(tmp_path):
    node = Node("n1", tmp_path)
    node.answer("begin", {"wanted": plain(Wanted(nodes=1, config=PreflightConfig(write_bytes=1000)))})
    assert node.answer("facts", {"token": ""})["write_bytes_s"] > 0


def plain(wanted: Wanted) -> dict[str, object]:
    import dataclasses

    return dataclasses.asdict(wanted)


@pytest.fixture(scope="module")
def real() -> Iterator[Lanes]:
    """Two processes with torch and gloo."""
    made = Lanes(2, False)
    yield made
    made.close()


def test_lanes_over_gloo_measure_pairs_and_sums(real):
    assert real.ask([{"ask": "hello"}] * 2, LONG_S) == [{"versions": {}}] * 2
    for op in ("pair", "all_reduce"):
        port = real.ask([{"ask": "open", "address": "127.0.0.1"}], LONG_S)[0]["port"]
        both = {**ALONE, "ask": "measure", "op": op, "port": port, "size": 2}
        told = real.ask([both, {**both, "rank": 1}], LONG_S)
        assert all(each["gb_s"] > 0 for each in told), told


def test_a_lane_whose_partner_does_not_come_says_so(real):
    port = real.ask([{"ask": "open", "address": "127.0.0.1"}], LONG_S)[0]["port"]
    told = real.ask([{**ALONE, "ask": "measure", "op": "pair", "port": port, "size": 2, "timeout_s": 0.5}], LONG_S)
    assert "error" in told[0] and "gb_s" not in told[0]
