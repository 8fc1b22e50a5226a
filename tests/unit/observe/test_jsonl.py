from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from shardforge.core.errors import DataError, EngineError
from shardforge.observe import health
from shardforge.observe.base import EvalReport
from shardforge.observe.jsonl import MetricsFile, Tail, read, replay


class Recorder:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.told = []

    def on_start(self, info):
        self.told.append(info)

    def on_step(self, report):
        self.told.append(report)

    def on_eval(self, report):
        self.told.append(report)

    def on_checkpoint(self, step, path):
        self.told.append((step, path))

    def on_end(self, verdict):
        self.told.append(verdict)


def test_every_line_is_an_event_that_strict_json_reads(tmp_path: Path, write_life):
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = write_life(tmp_path, [1, 2], evals=[2]).read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse)["event"] for line in lines]
    assert events == ["start", "step", "step", "eval", "checkpoint", "end"]


def test_a_step_is_on_disk_before_the_next_call(tmp_path: Path, make_info, make_report):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(make_info())
    file.on_step(make_report(1))
    assert read(tmp_path / "metrics.jsonl").steps == [1]
    file.on_end("finished")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_reads_back_as_nan(tmp_path: Path, make_info, make_report, value: float):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(make_info())
    file.on_step(make_report(1, loss=value))
    file.on_end("failed")
    assert math.isnan(read(tmp_path / "metrics.jsonl").columns["loss"][0])


@pytest.mark.parametrize("cut", [1, 2, 40, 200])
def test_a_torn_last_line_is_not_read(tmp_path: Path, write_life, cut: int):
    path = write_life(tmp_path, [1, 2, 3], verdict="")
    path.write_bytes(path.read_bytes()[:-cut])
    assert read(path).steps == [1, 2]


@pytest.mark.parametrize("size", [10, 70_000, 140_000])
def test_a_resumed_run_cuts_the_torn_line_off(tmp_path: Path, write_life, size: int):
    path = write_life(tmp_path, [1, 2], verdict="")
    with path.open("ab") as file:
        file.write(b'{"event": "step", "step": 3' + b" " * size)
    assert read(write_life(tmp_path, [3], first_step=2)).steps == [1, 2, 3]


def test_a_file_that_is_only_a_torn_line_starts_afresh(tmp_path: Path, write_life):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"event": "sta')
    assert read(write_life(tmp_path, [1])).steps == [1]


@pytest.mark.parametrize("line", [b"not json", b"[1, 2]", b'{"event": "step"}', b"\xff\xfe", b"\0\0\0"])
def test_a_damaged_line_is_named_by_file_and_line(tmp_path: Path, write_life, line: bytes):
    path = write_life(tmp_path, [1])
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([whole[0], line + b"\n", *whole[1:]]))
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.where == f"{path}:2"


def test_a_full_disk_is_an_engine_error(tmp_path: Path, make_info, make_report, monkeypatch: pytest.MonkeyPatch):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(make_info())

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(EngineError, match="No space left"):
        file.on_step(make_report(1))
    monkeypatch.undo()
    file.on_end("failed")


def test_a_line_of_which_the_disk_took_only_a_part_is_taken_back(
    tmp_path: Path, make_info, make_report, monkeypatch: pytest.MonkeyPatch
):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(make_info())
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, line: write(handle, line[:20]))
    with pytest.raises(EngineError):
        file.on_step(make_report(1))
    monkeypatch.undo()
    file.on_end("failed")
    assert read(tmp_path / "metrics.jsonl").verdict == "failed"


def test_a_tail_goes_on_where_it_ended(tmp_path: Path, write_life):
    path = write_life(tmp_path, [1], verdict="")
    tail = Tail(path)
    before = [event["event"] for event in tail.new()]
    write_life(tmp_path, [2], first_step=1)
    assert (before, [event["event"] for event in tail.new()]) == (["start", "step"], ["start", "step", "end"])


def test_a_tail_waits_for_the_end_of_a_line(tmp_path: Path, write_life):
    path = write_life(tmp_path, [1], verdict="")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    tail = Tail(path)
    before = [event["event"] for event in tail.new()]
    path.write_bytes(whole)
    assert (before, [event["event"] for event in tail.new()]) == (["start"], ["step"])


def test_replayed_events_equal_the_first_ones(tmp_path: Path, make_info, make_report):
    told, file = Recorder(), MetricsFile(tmp_path / "metrics.jsonl")
    for observer in (told, file):
        observer.on_start(make_info(recipe={}))
        observer.on_step(make_report(1))
        observer.on_eval(EvalReport(step=1, loss=2.5, tokens=7))
        observer.on_checkpoint(1, tmp_path / "checkpoints" / "step-1")
        observer.on_end("finished")
    again = Recorder()
    for event in Tail(tmp_path / "metrics.jsonl").new():
        replay(event, again, tmp_path)
    assert again.told == told.told


def test_replayed_slow_ranks_equal_the_recorded_ones(tmp_path: Path, make_info, make_report, late):
    file, again = MetricsFile(tmp_path / "metrics.jsonl"), Recorder()
    file.on_start(make_info())
    file.on_step(make_report(1, slow=(late,)))
    file.on_step(make_report(2))
    for event in Tail(tmp_path / "metrics.jsonl").new():
        replay(event, again, tmp_path)
    file.on_end("finished")
    assert [report.slow for report in again.told[1:]] == [(late,), ()]


def test_only_steps_with_a_slow_rank_say_so(tmp_path: Path, make_info, make_report, late):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(make_info())
    file.on_step(make_report(1))
    file.on_step(make_report(2, slow=(late,)))
    file.on_end("finished")
    steps = [event for event in Tail(tmp_path / "metrics.jsonl").new() if event["event"] == "step"]
    assert [event.get("slow") for event in steps] == [None, [vars(late)]]


RESTART = {"job": "123", "restart": 2, "reason": "node2 went down"}


def test_a_start_says_which_restart_it_is_and_why(tmp_path: Path, write_life, make_info):
    again = Recorder()
    path = write_life(tmp_path, [1], attempt=RESTART)
    for event in Tail(path).new():
        replay(event, again, tmp_path)
    assert again.told[0].attempt == RESTART and read(path).starts[0].attempt == RESTART


def test_a_start_of_an_older_version_says_nothing_of_it(tmp_path: Path, write_life):
    path, again = write_life(tmp_path, [1]), Recorder()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    del events[0]["attempt"]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    for event in Tail(path).new():
        replay(event, again, tmp_path)
    assert again.told[0].attempt == {} and read(path).steps == [1]


def test_missing_metrics_name_the_folder(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read(tmp_path / "metrics.jsonl")
    assert caught.value.where == str(tmp_path)


def test_loads_of_large_mixtures_are_told_in_some_steps_only(
    tmp_path: Path, write_mixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(health, "LOADS", 2)  # of 8: every fourth step
    lines = [json.loads(line) for line in write_mixture(tmp_path, range(2, 11)).read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps if "relative" in line["experts"]] == [2, 4, 8, 10]
    assert all(line["experts"]["dead"] == [0, 0] for line in steps)


def test_replayed_experts_equal_the_recorded_ones(tmp_path: Path, write_mixture):
    again = Recorder()
    for event in Tail(write_mixture(tmp_path, [1], lost_at=1)).new():
        replay(event, again, tmp_path)
    step, held_out = again.told[1:3]
    assert {layer: use.relative for layer, use in step.experts.items()} == {1: (1, 1, 1, 1), 3: (3.8, 0.2, 0, 0)}
    assert held_out.similarity == {1: 0.125, 3: 0.1}
