from __future__ import annotations

import json

import pytest

from shardforge.launch import pace as module
from shardforge.launch.pace import pace

START = {"event": "start", "time": 1.0, "name": "a", "layout": "one", "world_size": 1, "weights": 1, "steps": 100}


def step(number: int, seconds: float = 2.0) -> dict:
    return {
        "event": "step", "time": 10.0 + number, "step": number, "steps": 100, "loss": 3.0, "terms": {}, "tokens": 10,
        "tokens_seen": 10 * number, "seconds": seconds, "experts": {"0": "not read here"},
    }  # fmt: skip


@pytest.fixture
def metrics(tmp_path):
    """metrics(event, ...): the file with these lines added."""
    path = tmp_path / "metrics.jsonl"

    def add(*events: dict | str):
        with path.open("a") as file:
            file.writelines(each if isinstance(each, str) else json.dumps(each) + "\n" for each in events)
        return path

    return add


def test_a_run_that_has_written_nothing_has_no_pace(tmp_path, metrics):
    assert pace(tmp_path / "metrics.jsonl") is None
    assert pace(metrics("")) is None


def test_before_the_first_step_there_is_only_news(metrics):
    found = pace(metrics({**START, "first_step": 0}))
    assert (found.news, found.report, found.rates) == (1.0, None, None)


def test_the_last_step_and_the_speed_without_the_first_of_a_life(metrics):
    found = pace(metrics({**START, "first_step": 0}, step(1, seconds=99), step(2), step(3)))
    assert (found.report.step, found.rates.step_seconds, found.rates.tokens_per_s, found.rates.eta_s) == (3, 2, 5, 194)


def test_only_the_last_life_tells_the_speed(metrics):
    path = metrics({**START, "first_step": 0}, step(1), step(2, 50), {**START, "first_step": 2}, step(3, 99), step(4))
    assert pace(path).rates.step_seconds == 2


def test_a_life_without_steps_yet_leaves_the_last_one_seen(metrics):
    found = pace(metrics({**START, "first_step": 0}, step(1), {**START, "first_step": 1, "time": 90.0}))
    assert (found.report.step, found.news, found.verdict) == (1, 90.0, "")


def test_a_half_written_line_at_the_end_was_never_said(metrics):
    found = pace(metrics({**START, "first_step": 0}, step(1), step(2), '{"event": "step", "time": 9'))
    assert found.report.step == 2


def test_how_it_ended_is_told_until_it_begins_again(metrics):
    path = metrics({**START, "first_step": 0}, step(1), {"event": "end", "time": 5.0, "verdict": "stopped"})
    assert pace(path).verdict == "stopped"
    assert pace(metrics({**START, "first_step": 1})).verdict == ""


@pytest.mark.parametrize("block", [1, 7, 300])
def test_lines_that_cross_blocks_are_whole(metrics, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    found = pace(metrics({**START, "first_step": 0}, step(1, 50), step(2), step(3)))
    assert (found.report.step, found.rates.step_seconds) == (3, 2)


def test_however_long_the_run_is_only_its_end_is_read(metrics, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    path = metrics({**START, "first_step": 0}, *(step(number) for number in range(1, 2000)))
    lines = list(module._newest(path))
    assert (len(lines), pace(path).report.step) == (module.STEPS, 1999)
