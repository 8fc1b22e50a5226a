from __future__ import annotations

from pathlib import Path

import pytest

from shardforge.core.errors import DataError
from shardforge.observe.history import Segment
from shardforge.observe.jsonl import read


def test_columns_hold_one_value_per_step_in_order(tmp_path: Path, write_life):
    history = read(write_life(tmp_path, range(1, 5)))
    assert history.steps == [1, 2, 3, 4] and history.columns["loss"] == [9.0, 8.0, 7.0, 6.0]


def test_a_resumed_life_supersedes_the_steps_it_repeats(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="")
    history = read(write_life(tmp_path, range(4, 7), first_step=3, shift=0.5))
    assert history.columns["loss"] == [9.0, 8.0, 7.0, 6.5, 5.5, 4.5]


def test_steps_taken_back_are_gone_before_they_are_repeated(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="")
    assert read(write_life(tmp_path, [], first_step=3, verdict="")).steps == [1, 2, 3]


def test_evals_and_checkpoints_after_the_resumed_step_are_taken_back(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="", evals=(2, 4))
    history = read(write_life(tmp_path, [], first_step=3, verdict=""))
    assert [report.step for report in history.evals] == [2] and history.checkpoints == [2]


def test_a_start_from_nothing_takes_everything_back(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6))
    assert read(write_life(tmp_path, [1], first_step=0, shift=0.5)).columns["loss"] == [9.5]


def test_segments_say_which_life_computed_which_steps(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="")
    history = read(write_life(tmp_path, range(4, 7), first_step=3, layout="tp2"))
    assert history.segments == [
        Segment(first_step=0, last_step=3, layout="dp2", world_size=2),
        Segment(first_step=3, last_step=6, layout="tp2", world_size=2),
    ]


def test_a_life_without_a_lasting_step_has_no_segment(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 4))
    write_life(tmp_path, [4], first_step=3, layout="tp2", verdict="")
    assert [part.layout for part in read(write_life(tmp_path, [4, 5], first_step=3)).segments] == ["dp2", "dp2"]


def test_resumes_are_the_steps_where_another_life_goes_on(tmp_path: Path, write_life):
    write_life(tmp_path, range(1, 6), verdict="")
    assert read(write_life(tmp_path, range(4, 7), first_step=3)).resumes == [3]


@pytest.mark.parametrize(("verdict", "read_as"), [("finished", "finished"), ("stopped", "stopped"), ("", "unfinished")])
def test_the_verdict_is_that_of_the_last_life(tmp_path: Path, write_life, verdict: str, read_as: str):
    write_life(tmp_path, range(1, 4), verdict="failed")
    assert read(write_life(tmp_path, [4], first_step=3, verdict=verdict)).verdict == read_as


def test_wall_time_counts_lives_and_not_the_pause_between_them(tmp_path: Path, write_life):
    path = write_life(tmp_path, [1, 2])  # start, two steps, end: three seconds by the clock
    path.write_text(path.read_text().replace('"time": 10', '"time": 90'))
    assert read(write_life(tmp_path, [3], first_step=2)).wall_seconds == 3 + 2


def test_training_seconds_add_up_the_kept_steps(tmp_path: Path, write_life):
    assert read(write_life(tmp_path, [1, 2, 3])).training_seconds() == [2.0, 4.0, 6.0]


def test_a_value_at_a_step_is_that_of_the_last_kept_step(tmp_path: Path, write_life):
    history = read(write_life(tmp_path, [2, 4]))
    tokens = history.columns["tokens_seen"]
    assert [history.at(step, tokens) for step in (1, 2, 3, 9)] == [0.0, 2000, 2000, 4000]


def test_metrics_without_a_start_are_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no start event"):
        read(tmp_path / "metrics.jsonl")
