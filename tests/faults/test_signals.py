"""A run that is asked to stop saves, says so, and goes on later as if it had not stopped."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shardforge.checkpoint import folders
from shardforge.observe.audience import Audience
from tests.faults import runs
from tests.faults.runs import STEPS

pytestmark = pytest.mark.slow

SELDOM = {"checkpoint": {"every": 0}}
FOR_EVER = {"train": {"steps": 10**6, "sequences": 4, "seq_len": 16, "eval_sequences": 0}}


def after_step(step: int, ask: Callable[[], None]) -> Callable[[], None]:
    """Call `ask` in the run when its observers are told of this step."""

    def prepare() -> None:
        tell = Audience.on_step

        def told(audience: Audience, report) -> None:
            tell(audience, report)
            if report.step == step:
                ask()

        Audience.on_step = told

    return prepare


def verdict(run_dir: Path) -> dict[str, object]:
    return json.loads((run_dir / "stopped.json").read_text())


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "STOP file"])
def test_a_stopped_run_has_saved_its_step_and_goes_on_with_the_same_losses(tmp_path, how):
    recipe, run_dir = str(runs.write_recipe(tmp_path, **SELDOM)), tmp_path / "run"
    assert runs.run(tmp_path, "train", recipe, "--set", f"run_dir={tmp_path / 'whole'}").code == 0

    def ask() -> None:
        (run_dir / "STOP").touch() if how == "STOP file" else os.kill(os.getpid(), signal.Signals[how])

    ended = runs.run(tmp_path, "train", recipe, prepare=after_step(4, ask))
    assert (ended.code, verdict(run_dir)) == (0, {"state": "stopped", "step": 5, "reason": how})
    assert folders.committed(run_dir / "checkpoints") == [5]
    assert runs.run(tmp_path, "train", recipe).code == 0
    assert verdict(run_dir) == {"state": "finished", "step": STEPS, "reason": ""}
    assert runs.losses(run_dir) == runs.losses(tmp_path / "whole")


def test_two_interrupts_end_a_run_at_once_and_leave_its_checkpoints(tmp_path):
    recipe, run_dir = str(runs.write_recipe(tmp_path)), tmp_path / "run"

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    ended = runs.run(tmp_path, "train", recipe, prepare=after_step(4, ask))
    assert ended.code == 130 and "interrupted" in ended.err and "Traceback" not in ended.err
    assert not (run_dir / "stopped.json").exists()
    assert runs.run(tmp_path, "train", recipe).code == 0


def test_a_launcher_that_is_asked_to_stop_stops_all_its_ranks(ranks, tmp_path):
    recipe = str(runs.write_recipe(tmp_path, **SELDOM, parallel={"tp": 2}))
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    with runs.shardforge(tmp_path, "train", recipe, "--set", "train.steps=1000000") as command:
        command.until(lambda: bool(runs.losses(run_dir)))
        command.ask(signal.SIGTERM)
        ended = command.ended()
    told = verdict(run_dir)
    step = told["step"]
    assert (ended.code, told["state"], told["reason"]) == (0, "stopped", "STOP file"), ended
    assert folders.committed(run_dir / "checkpoints") == [step] and not (run_dir / "STOP").exists()
    last = f"train.steps={step + 2}"
    assert ranks(2).run(runs.turn, recipe, last) == ["finished"] * 2
    assert ranks(2).run(runs.turn, recipe, last, f"run_dir={whole}") == ["finished"] * 2
    assert runs.losses(run_dir) == runs.losses(whole)


def test_a_launcher_that_is_interrupted_twice_leaves_no_rank_behind(tmp_path):
    recipe = str(runs.write_recipe(tmp_path, **FOR_EVER, parallel={"dp_shard": 2}))
    with runs.shardforge(tmp_path, "train", recipe) as command:
        command.until(lambda: len(runs.losses(tmp_path / "run")) > 1)
        everyone = psutil.Process(command.process.pid).children(recursive=True)
        command.ask(signal.SIGINT)
        command.until(lambda: (tmp_path / "run" / "STOP").exists() or (tmp_path / "run" / "stopped.json").exists())
        command.ask(signal.SIGINT)
        ended = command.ended()
    assert ended.code in (0, 130), ended  # 0 when the ranks were quicker than the second interrupt
    assert "Traceback" not in ended.err
    assert not any(each.is_running() for each in everyone)
