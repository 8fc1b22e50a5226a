from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardforge.core.errors import EngineError
from shardforge.core.rundir import RunDir
from shardforge.engine.base import Losses, UpdateStats
from shardforge.observe.audience import Audience
from shardforge.observe.base import Slow
from shardforge.observe.experts import ExpertTally
from shardforge.train.loop import train
from shardforge.train.pace import Pace
from shardforge.train.run import Run
from shardforge.train.world import World
from tests.tiny import tiny


class Events(list):
    """What happened, in order; stands for engine, data, store and the one observer of a run."""

    fingerprint, step_flops, weights = "data", 1.0, 1
    losses: dict[int, float] = {}
    before: Callable[[int], None] = staticmethod(lambda step: None)

    def batch(self, step: int) -> str:
        return f"batch {step}"

    def forward_backward(self, batch: str, step: int) -> Losses:
        self.before(step)
        self.append(f"forward {batch}")
        return Losses(self.losses.get(step, 1.0), {}, 4)

    def update(self, lr: float) -> UpdateStats:
        self.append(f"update {lr:g}")
        return UpdateStats(1.0)

    def evaluate(self, batch: Losses) -> Losses:
        return batch

    def similarity(self) -> dict[int, float]:
        return {1: 0.25}

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def held_out_batches(self, count: int) -> Iterator[Losses]:
        yield from (Losses(1.0, {}, 10), Losses(4.0, {}, 20))

    def sequences(self, step: int) -> int:
        return 8

    def tokens_before(self, step: int) -> int:
        return step * 8

    def save(self, step: int, tensors: dict, extra: dict) -> float:
        self.append(f"save {step} {extra}")
        return 0.0

    def close(self) -> None:
        self.append("close")

    def on_step(self, report: Any) -> None:
        self.append(f"told {report.step}")

    def on_eval(self, report: Any) -> None:
        self.append(f"held-out {report.loss:g} of {report.tokens} after {report.step}")
        self.append(f"alike {report.similarity}")

    def on_checkpoint(self, step: int, path: Path) -> None:
        self.append(f"{path.name}")

    def on_end(self, verdict: str) -> None:
        self.append(f"end {verdict}")


@pytest.fixture
def run(tmp_path) -> Callable[..., tuple[Run, Events]]:
    def make(step: int = 0, steps: int = 3, every: int = 0, **train_options: int) -> tuple[Run, Events]:
        events = Events()
        sizes = {"steps": steps, "sequences": 8, "seq_len": 16, "eval_sequences": 0} | train_options
        recipe = tiny(
            train=sizes,
            checkpoint={"every": every},
            schedule={"kind": "linear", "lr": 3.0},
        )
        world = World(0, 1, torch.device("cpu"), None)
        made = Run(recipe, RunDir(tmp_path), world, events, events, events, Audience([events]), step, 0.0, None)
        return made, events

    return make


def only(events: Events, *words: str) -> list[str]:
    return [event for event in events if event.startswith(words)]


def test_every_step_reads_its_batch_and_takes_its_rate(run):
    made, events = run()
    assert train(made) == "finished"
    assert only(events, "forward", "update") == [
        "forward batch 0",
        "update 3",
        "forward batch 1",
        "update 2",
        "forward batch 2",
        "update 1",
    ]


def test_a_resumed_run_goes_on_with_its_next_step(run):
    made, events = run(step=2)
    train(made)
    assert only(events, "forward", "told") == ["forward batch 2", "told 3"]


def test_observers_are_told_how_experts_were_used(run):
    made, events = run(steps=1)
    tally, told = ExpertTally((3.0, 1.0), 2.0, 0.5, 0.0), []
    events.forward_backward = lambda batch, step: Losses(1.0, {}, 4, {7: tally})
    events.on_step = lambda report: told.append(report.experts)
    train(made)
    assert told == [{7: tally}]


@pytest.mark.parametrize(("every", "saved"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])])
def test_checkpoints_come_when_they_are_due_and_at_the_end(run, every, saved):
    made, events = run(steps=5, every=every)
    train(made)
    assert only(events, "save") == [f"save {step} {{'data': 'data'}}" for step in saved]


def test_a_stop_request_saves_the_step_and_ends_the_run(run, tmp_path):
    made, events = run(steps=5)
    events.before = lambda step: signal.raise_signal(signal.SIGTERM) if step == 1 else None
    assert train(made) == "stopped"
    assert only(events, "forward", "save", "end") == [
        "forward batch 0",
        "forward batch 1",
        "save 2 {'data': 'data'}",
        "end stopped",
    ]
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"state": "stopped", "step": 2, "reason": "SIGTERM"}


def test_a_step_that_is_due_anyway_is_saved_once_when_the_run_stops(run):
    made, events = run(steps=5, every=2)
    events.before = lambda step: signal.raise_signal(signal.SIGUSR1) if step == 1 else None
    train(made)
    assert only(events, "save") == ["save 2 {'data': 'data'}"]


def test_a_request_at_the_last_step_is_a_finished_run(run, tmp_path):
    made, events = run(steps=2)
    events.before = lambda step: signal.raise_signal(signal.SIGTERM) if step == 1 else None
    assert train(made) == "finished"
    assert json.loads((tmp_path / "stopped.json").read_text())["state"] == "finished"


def test_a_stop_file_is_gone_after_the_stop(run, tmp_path):
    made, events = run(steps=5)
    events.before = lambda step: (tmp_path / "STOP").touch() if step == 1 else None
    assert train(made) == "stopped"
    assert not (tmp_path / "STOP").exists()


def test_the_text_of_a_stop_file_is_the_reason_that_the_verdict_gives(run, tmp_path):
    made, events = run(steps=5)
    events.before = lambda step: (tmp_path / "STOP").write_text("walltime\n") if step == 1 else None
    assert train(made) == "stopped"
    assert json.loads((tmp_path / "stopped.json").read_text())["reason"] == "walltime"


def test_a_wish_that_was_not_the_reason_is_left_for_the_launcher(run, tmp_path):
    made, events = run(steps=5)

    def ask(step: int) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
            (tmp_path / "STOP").write_text("asked by me")

    events.before = ask
    assert train(made) == "stopped"
    assert (tmp_path / "STOP").read_text() == "asked by me"


def test_the_launcher_that_named_a_start_finds_its_name_in_the_verdict(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDFORGE_START", "12.0.1")
    monkeypatch.setenv("RANK", "0")
    made, _ = run(steps=1)
    train(made)
    assert json.loads((tmp_path / "stopped.json").read_text())["start"] == "12.0.1"


def test_slow_ranks_are_told_once(run):
    made, events = run(steps=3)
    slow, pace, told = Slow(1, "dp1", "node2", "work", 2.0, 1.0), Pace(), []
    events.on_step = lambda report: told.append(report.slow)
    events.before = lambda step: setattr(pace, "slow", (slow,)) if step == 1 else None
    train(made, pace)
    assert told == [(), (slow,), ()]


def test_the_own_time_of_a_step_has_no_save_and_no_report_in_it(run):
    made, events = run(steps=4, every=1)
    clock, pace = [0.0], Pace(lambda: clock[0])
    events.before = lambda step: clock.append(clock.pop() + 2.0)
    events.on_step = lambda report: clock.append(clock.pop() + 100.0)
    made.store = SimpleNamespace(save=lambda *state: clock.append(clock.pop() + 50.0) or 0.0, close=lambda: None)
    train(made, pace)
    assert (pace.sums.steps, pace.sums.seconds) == (4, 8.0)


def test_the_verdict_is_written_after_the_last_save_is_on_disk(run, tmp_path):
    made, events = run(steps=1)
    made.store = SimpleNamespace(
        save=events.save, close=lambda: events.append(f"closed, verdict {(tmp_path / 'stopped.json').exists()}")
    )
    train(made)
    assert only(events, "closed") == ["closed, verdict False"] and (tmp_path / "stopped.json").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_lost_is_neither_saved_nor_told(run, bad):
    made, events = run(steps=5, every=1)
    events.losses = {2: bad}
    with pytest.raises(EngineError, match="step 2"):
        train(made)
    assert [event.split()[1] for event in only(events, "save", "told")] == ["1", "1", "2", "2"]


@pytest.mark.parametrize(("every", "steps"), [(0, [4]), (2, [2, 4]), (3, [3, 4])])
def test_evaluations_come_when_they_are_due_and_at_the_end(run, every, steps):
    made, events = run(steps=4, eval_every=every, eval_sequences=2)
    train(made)
    assert only(events, "held-out") == [f"held-out 3 of 30 after {step}" for step in steps]


def test_how_alike_experts_are_is_told_with_each_evaluation(run):
    made, events = run(steps=4, eval_every=2, eval_sequences=2)
    train(made)
    assert only(events, "alike") == ["alike {1: 0.25}"] * 2


def test_without_held_out_sequences_nothing_is_evaluated(run):
    made, events = run(steps=4, eval_every=1, eval_sequences=0)
    train(made)
    assert only(events, "held-out") == []


def test_a_finished_run_does_nothing_more(run, tmp_path):
    made, events = run(step=3)
    assert train(made) == "finished"
    assert only(events, "forward", "save", "told") == []
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"state": "finished", "step": 3, "reason": ""}
