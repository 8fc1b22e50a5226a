from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardforge.core.errors import Problems
from shardforge.core.rundir import RunDir
from shardforge.data.synthetic import markov
from shardforge.recipe.sweep import Sweep, load_sweep
from shardforge.train import sweep
from tests.tiny import mapping

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path) -> Write:
    """write({arm: changes}, **shared): the file of a sweep over a tiny recipe and a corpus."""
    markov(tmp_path / "corpus", vocab=32, documents=40, tokens=30)

    def make(arms: dict[str, Any], **shared: Any) -> Path:
        recipe = mapping(data={"sources": [{"path": str(tmp_path / "corpus")}]}, **shared)
        recipe |= {"name": "three", "run_dir": str(tmp_path / "out")}
        path = tmp_path / "three.yaml"
        path.write_text(json.dumps(recipe | {"arms": arms}))  # JSON is YAML
        return path

    return make


def end(made: Sweep, arm: str, state: str = "finished", step: int = 2) -> None:
    """Leave what a run of this arm leaves."""
    run = RunDir(made.folder / arm)
    run.path.mkdir(parents=True)
    run.stopped.write_text(json.dumps({"state": state, "step": step, "reason": ""}))
    start = {"event": "start", "time": 1.0, "name": arm, "layout": "1", "first_step": 0, "steps": 2, "weights": 1}
    run.metrics.write_text(json.dumps(start | {"world_size": 1, "unigram_entropy": None}) + "\n")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Arms that were started, in order; each ends as a finished run does, and none is a process."""
    started: list[str] = []
    monkeypatch.setattr(sweep, "_process", lambda words: (started.append(words[-1]), (0, False))[1])
    monkeypatch.setattr(sweep, "overlay", lambda made: None)
    return started


def go(made: Sweep) -> int:
    return sweep.run(made, lambda arm: ["sweep", "file", "--arm", arm])


def test_arms_run_in_the_order_of_the_file(write, ran):
    assert go(load_sweep(write({"b": {}, "a": {}}))) == 0 and ran == ["b", "a"]


def test_a_finished_arm_is_skipped(write, ran):
    made = load_sweep(write({"a": {}, "b": {}}))
    end(made, "a")
    go(made)
    assert ran == ["b"]


@pytest.mark.parametrize("left", [{"state": "stopped", "step": 1}, {"state": "finished", "step": 1}], ids=str)
def test_an_arm_that_has_steps_left_goes_on(write, ran, left):
    made = load_sweep(write({"a": {}}))
    end(made, "a", **left)
    go(made)
    assert ran == ["a"]


def test_a_failed_arm_leaves_the_others_running_and_gives_the_exit_code(write, ran, monkeypatch):
    made = load_sweep(write({"a": {}, "b": {}, "c": {}}))
    codes = {"a": 0, "b": 2, "c": 1}
    monkeypatch.setattr(sweep, "_process", lambda words: (ran.append(words[-1]), (codes[words[-1]], False))[1])
    assert go(made) == 2 and ran == ["a", "b", "c"]


def test_a_request_to_stop_ends_the_sweep(write, ran, monkeypatch):
    monkeypatch.setattr(sweep, "_process", lambda words: (ran.append(words[-1]), (0, True))[1])
    assert go(load_sweep(write({"a": {}, "b": {}}))) == 0 and ran == ["a"]


def test_all_that_is_wrong_with_any_arm_is_told_before_the_first_starts(write, tmp_path):
    start = {"steps": 2, "sequences": 8, "seq_len": 16, "start": str(tmp_path / "gone")}
    arms = {"a": {"train": start}, "b": {"data": {"sources": [{"path": str(tmp_path / "none")}]}}}
    with pytest.raises(Problems) as caught:
        sweep.check(load_sweep(write(arms)))
    assert "train.start: there is nothing here" in str(caught.value) and "none" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_sound_sweep_passes_the_checks(write):
    sweep.check(load_sweep(write({"a": {}, "b": {"seed": 5}})))


def test_the_report_overlays_all_arms_that_have_begun(write):
    made = load_sweep(write({"a": {}, "b": {}, "c": {}}))
    assert sweep.overlay(made) is None
    end(made, "a")
    end(made, "c")
    text = sweep.overlay(made).read_text()
    assert made.folder / "report.html" == sweep.overlay(made)
    assert text.count('"name": "a"') + text.count('"name":"a"') and text.count('"name":"c"') + text.count('"name": "c"')


def test_a_signal_is_passed_on_to_the_arm(monkeypatch):
    # the child asks its parent for the stop that the parent then passes on
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "while True: signal.pause()\n"
    )
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, "-c", script))
    assert sweep._process([]) == (7, True)
