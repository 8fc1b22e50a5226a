from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train import guard, stacks
from shardforge.train.place import stack_of


@pytest.fixture
def recorded(monkeypatch) -> Callable[..., None]:
    """recorded(entries): what the flight recorder holds."""

    def record(*entries: dict) -> None:
        monkeypatch.setattr(stacks, "recorder", lambda: lambda *asked: json.dumps({"entries": entries}).encode())

    record()
    return record


def here() -> str:
    return stacks.told(stack_of(threading.get_ident())[1:])


@pytest.fixture
def at_work() -> Iterator[Callable[[str], None]]:
    """at_work(name): a thread of this name that is in a line of this program."""
    ended = threading.Event()
    made: list[threading.Thread] = []

    def begin(name: str) -> None:
        inside = threading.Event()

        def work() -> int:
            inside.set()
            return int(ended.wait())

        there = (RunDir(Path("nowhere")), Layout(), work)
        made.append(threading.Thread(target=guard.guarded, args=there, name=name))
        made[-1].start()
        inside.wait()

    yield begin
    ended.set()
    for each in made:
        each.join()


def test_the_main_thread_is_told_from_the_outermost_call_to_the_innermost(recorded):
    recorded()
    lines = here().splitlines()
    assert lines[0] == "main thread, most recent call last:" and lines[-1].endswith(" in here")


def test_other_threads_in_a_line_of_ours_are_told_by_name(recorded, at_work):
    recorded()
    at_work("checkpoint-7")
    text = here()
    assert "thread checkpoint-7, most recent call last:\n" in text and " in guarded\n" in text


def test_what_every_run_has_is_left_out(recorded, at_work):
    recorded()
    main, ended = stack_of(threading.get_ident()), threading.Event()
    before = stacks.told(main)
    at_work("shardforge-pulse")
    other = threading.Thread(target=ended.wait)
    other.start()
    after = stacks.told(main)
    ended.set()
    other.join()
    assert after == before


def test_collectives_that_have_not_ended_are_told_as_the_flight_recorder_knows_them(recorded):
    known = {"process_group": ["3", "mesh_dp_shard"], "collective_seq_id": 17, "input_sizes": [[8]]}
    known |= {"output_sizes": [[2]], "profiling_name": "nccl:_reduce_scatter_base"}
    recorded(known | {"retired": True, "state": "completed"}, known | {"retired": False, "state": "started"})
    told = "nccl:_reduce_scatter_base of group 3, mesh_dp_shard, call 17, [[8]] to [[2]], started"
    assert here().endswith(f"torch's flight recorder, unfinished:\n  {told}")


def test_a_deep_stack_is_told_by_its_innermost_frames(recorded):
    recorded()

    def deeper(depth: int) -> str:
        return deeper(depth - 1) if depth else here()

    lines = deeper(200).splitlines()
    assert len(lines) == stacks.DEEP + 1 and lines[-1].endswith(" in here")
