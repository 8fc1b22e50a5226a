from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardforge.cli.main import main
from shardforge.cli.watch import attach
from shardforge.core.errors import DataError

START = {
    "event": "start", "time": 0.0, "name": "first", "layout": "one", "world_size": 1, "weights": 10, "steps": 3,
    "first_step": 0,
}  # fmt: skip
EVAL = {"event": "eval", "time": 1.0, "step": 1, "loss": 2.5, "tokens": 7}
END = {"event": "end", "time": 2.0, "verdict": "finished"}
STOP = {"event": "end", "time": 2.0, "verdict": "stopped"}


class Recorder:
    def __init__(self):
        self.told: list[str] = []

    def on_start(self, info):
        self.told.append(f"start {info.first_step}")

    def on_eval(self, report):
        self.told.append(f"eval {report.step}")

    def on_end(self, verdict):
        self.told.append(verdict)

    def close(self):
        self.told.append("closed")


def write(folder: Path, *events: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def never() -> None:
    raise AssertionError("nothing more is to come")


def test_a_finished_run_is_told_at_once(tmp_path: Path):
    write(tmp_path, START, EVAL, END)
    seen = Recorder()
    attach(tmp_path, seen, never)
    assert seen.told == ["start 0", "eval 1", "finished", "closed"]


def test_news_is_told_as_it_comes(tmp_path: Path):
    write(tmp_path, START)
    seen, news = Recorder(), iter([(EVAL,), (), (END,)])
    attach(tmp_path, seen, lambda: write(tmp_path, *next(news)))
    assert seen.told == ["start 0", "eval 1", "finished", "closed"]


def test_a_stopped_life_that_was_resumed_is_not_the_end(tmp_path: Path):
    write(tmp_path, START, STOP, {**START, "first_step": 1})
    seen = Recorder()
    attach(tmp_path, seen, lambda: write(tmp_path, END))
    assert seen.told == ["start 0", "start 1", "finished", "closed"]


def test_an_interrupt_closes_the_display(tmp_path: Path):
    write(tmp_path, START)
    seen = Recorder()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attach(tmp_path, seen, interrupt)
    assert seen.told == ["start 0", "closed"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(DataError):
        attach(tmp_path / "x", Recorder(), never)


def test_without_a_terminal_it_prints_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path, START, EVAL, END)
    assert main(["watch", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run finished"
