from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import pytest

from shardforge.core.errors import DataError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train import guard
from shardforge.train.lock import Occupied

DP2 = Layout(dp_shard=2)
MISTAKE = DataError("it is wrong", "here", "mend it")


@pytest.fixture
def run_dir(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def rank(monkeypatch) -> Callable[..., None]:
    """rank(1, start="a"): go on as this rank of that start of two processes."""

    def become(number: int, start: str = "a") -> None:
        for name, value in {"RANK": str(number), "WORLD_SIZE": "2", "SHARDFORGE_START": start}.items():
            monkeypatch.setenv(name, value)

    return become


def fail(run_dir: RunDir, error: BaseException) -> int:
    def work() -> int:
        raise error

    return guard.guarded(run_dir, DP2, work)


def test_work_that_succeeds_is_quiet_and_its_code_comes_back(run_dir, capsys):
    assert guard.guarded(run_dir, DP2, lambda: 7) == 7
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MISTAKE, 2, "error: here  it is wrong\n    fix: mend it\n"),
        (KeyboardInterrupt(), 130, "interrupted; the last committed checkpoint"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
        (RuntimeError("[gloo] Connection closed by peer [10.0.0.1]"), 1, "error: "),
    ],
    ids=["mistake", "interrupt", "bug", "lost rank"],
)
def test_each_failure_has_its_exit_code_and_its_words(run_dir, capsys, error, code, told):
    assert fail(run_dir, error) == code
    assert told in capsys.readouterr().err


def test_a_mistake_of_the_user_has_no_traceback(run_dir, capsys):
    fail(run_dir, MISTAKE)
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_names_the_rank_and_its_place_and_has_a_traceback(run_dir, rank, capsys):
    rank(1)
    fail(run_dir, ValueError("a bug"))
    told = capsys.readouterr().err
    assert "rank 1 (dp_replicate 0, dp_shard 1, tp 0) failed" in told and "Traceback" in told


def test_a_lost_rank_is_no_bug_of_the_ranks_that_noticed(run_dir, rank, capsys):
    rank(0)
    fail(run_dir, RuntimeError("Connection reset by peer"))
    told = capsys.readouterr().err
    assert "lost contact with another rank" in told and "Traceback" not in told


def test_one_rank_speaks_for_a_start(run_dir, rank, capsys):
    for number in (1, 0):
        rank(number)
        assert fail(run_dir, MISTAKE) == 2
    assert capsys.readouterr().err.count("error:") == 1
    assert json.loads(run_dir.failure.read_text())["rank"] == 1


def test_the_next_start_speaks_again(run_dir, rank, capsys):
    for start in ("a", "b"):
        rank(0, start)
        fail(run_dir, MISTAKE)
    assert capsys.readouterr().err.count("error:") == 2


def test_a_start_speaks_again_when_an_earlier_one_had_the_same_name(run_dir, rank, capsys):
    """torchrun's own names, ports and process numbers come again; a record older than this process is another's."""
    rank(0)
    fail(run_dir, MISTAKE)
    said = json.loads(run_dir.failure.read_text())
    run_dir.failure.write_text(json.dumps(said | {"time": time.time() - 1e6}))
    fail(run_dir, MISTAKE)
    assert capsys.readouterr().err.count("error:") == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_torn_record_silences_nobody(run_dir, rank, capsys, text):
    rank(0)
    run_dir.path.mkdir()
    run_dir.failure.write_text(text)
    fail(run_dir, MISTAKE)
    assert capsys.readouterr().err.count("error:") == 1


def test_the_record_says_who_and_what(run_dir, rank):
    rank(1)
    fail(run_dir, MISTAKE)
    said = json.loads(run_dir.failure.read_text())
    assert (said["rank"], said["pid"], said["message"]) == (1, os.getpid(), f"error: {MISTAKE}")


@pytest.mark.parametrize(("number", "voices"), [(0, 1), (1, 0)])
def test_in_a_directory_of_a_living_run_the_first_rank_speaks_and_nothing_is_written(
    run_dir, rank, capsys, number, voices
):
    rank(number)
    assert fail(run_dir, Occupied("a run is alive", "here", "wait")) == 2
    assert capsys.readouterr().err.count("error:") == voices
    assert not run_dir.path.exists()


@pytest.mark.parametrize(("number", "voices"), [(0, 1), (1, 0)])
def test_where_nothing_can_be_written_the_first_rank_speaks(tmp_path, rank, capsys, number, voices):
    (tmp_path / "file").touch()
    rank(number)
    assert fail(RunDir(tmp_path / "file" / "run"), MISTAKE) == 2
    assert capsys.readouterr().err.count("error:") == voices


def test_ranks_of_one_start_agree_on_its_name(rank):
    names = []
    for number in (0, 1):
        rank(number)
        names.append(guard.start_id())
    assert names[0] == names[1]
