from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardforge.core.rundir import RunDir
from shardforge.train import vigil
from shardforge.train.vigil import BEGIN_S, LATER_S, LEAVE_S, Vigil

START, TIMEOUT = "12.0.1", 100
HOLDER = {"host": "far", "pid": 7, "start": START, "machine": "m", "id": "x", "node": "node3"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"train": {"timeout": TIMEOUT}}))
    return RunDir(tmp_path)


@pytest.fixture
def watch(run_dir, clock) -> Vigil:
    return Vigil(run_dir, START, clock)


def beat(run_dir: RunDir, number: int, **changes: object) -> None:
    run_dir.lock.write_text(json.dumps(HOLDER | changes))
    os.utime(run_dir.lock, (number, number))


def test_a_run_that_beats_is_left_alone(watch, run_dir, clock):
    for number in range(10):
        beat(run_dir, number)
        clock.now += TIMEOUT
        assert watch.look() is None


def test_a_first_rank_that_beats_no_more_is_named_with_its_node_after_the_ranks_had_their_time(watch, run_dir, clock):
    beat(run_dir, 1)
    assert watch.look() is None
    clock.now = TIMEOUT + LATER_S
    assert watch.look() is None
    clock.now += 1
    found = watch.look()
    assert "rank 0 (process 7 on far) has given no sign of life for 161 s" in found.text
    assert (found.cause, found.node, [each.rank for each in found.blamed]) == ("frozen", "node3", [0])


def test_a_start_may_take_long_and_not_for_ever(watch, clock):
    clock.now = BEGIN_S
    assert watch.look() is None
    clock.now += 1
    assert "no rank has begun to train" in watch.look().text


def test_the_lease_of_another_start_is_no_sign_of_life(watch, run_dir, clock):
    beat(run_dir, 1, start="11.0.1")
    watch.look()
    clock.now = BEGIN_S + 1
    beat(run_dir, 2, start="11.0.1")
    assert watch.look() is not None


def test_ranks_that_have_spoken_have_time_to_leave(watch, run_dir, clock):
    run_dir.failure.write_text(json.dumps({"start": START, "message": "error: ..."}))
    clock.now = LEAVE_S
    assert watch.look() is None
    clock.now += 1
    assert watch.look().text == ""


@pytest.mark.parametrize("text", ['{"start": "11.0.1"}', '{"sta', "[]"])
def test_what_another_start_said_is_not_heard(watch, run_dir, clock, text):
    run_dir.failure.write_text(text)
    clock.now = LEAVE_S + 1
    assert watch.look() is None


@pytest.mark.parametrize("text", ["", "{", "train: {}"])
def test_without_a_readable_recipe_the_usual_time_is_taken(run_dir, text):
    run_dir.recipe.write_text(text)
    assert vigil.patience(run_dir) == vigil.DEFAULT_TIMEOUT_S


def test_the_launcher_writes_what_no_rank_could(run_dir, monkeypatch, capsys):
    beat(run_dir, 1)
    monkeypatch.setattr(vigil, "LATER_S", -TIMEOUT - 1.0)
    assert vigil.main([str(run_dir.path), "--start", START]) == 1
    said = json.loads(run_dir.failure.read_text())
    assert (said["start"], said["rank"], said["node"], said["code"]) == (START, -1, "node3", 1)
    assert run_dir.verdict.read_text() == capsys.readouterr().err == f"{said['message']}\n"


def test_what_a_rank_has_said_is_left_as_it_is(run_dir, monkeypatch):
    run_dir.failure.write_text(said := json.dumps({"start": START}))
    monkeypatch.setattr(vigil, "LEAVE_S", -1.0)
    assert vigil.main([str(run_dir.path), "--start", START]) == 1
    assert run_dir.failure.read_text() == said and not run_dir.verdict.exists()


def test_it_looks_again_and_again(run_dir, monkeypatch):
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            monkeypatch.setattr(vigil, "BEGIN_S", -1.0)

    assert vigil.main([str(run_dir.path), "--start", START], pause) == 1
    assert pauses == [vigil.LOOK_S] * 3


def test_a_launcher_needs_no_torch_for_it():
    names = "import sys; from shardforge.train import vigil; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", names], cwd=Path.cwd()).returncode == 0
