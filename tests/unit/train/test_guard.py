from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable

import pytest

from shardforge.core.errors import CheckpointError, DataError
from shardforge.core.layout import Layout
from shardforge.core.rundir import RunDir
from shardforge.train import guard
from shardforge.train.failure import Failure
from shardforge.train.lock import Occupied
from shardforge.train.world import FailedThere, Unmet

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
    assert "rank 1 (dp1) failed" in told and "Traceback" in told


def test_a_lost_rank_is_no_bug_of_the_ranks_that_noticed(run_dir, rank, capsys):
    rank(0)
    fail(run_dir, RuntimeError("Connection reset by peer"))
    told = capsys.readouterr().err
    assert "lost contact with another rank" in told and "Traceback" not in told


def test_what_another_rank_met_is_told_with_its_place_and_traceback(run_dir, rank, capsys):
    rank(0)
    assert fail(run_dir, FailedThere(1, "Traceback ...\nValueError: a bug")) == 1
    told = capsys.readouterr().err
    assert told == "rank 1 (dp1) failed:\nTraceback ...\nValueError: a bug\n"


class Neighbours:
    """Stands for the pulses of the other ranks."""

    def __init__(self, known: str | None):
        self.known = None if known is None else Failure(text=known)
        self.seen, self.told = [], []

    def lost(self, error: BaseException) -> Failure | None:
        self.seen.append(str(error))
        return self.known

    def tell(self, failure: Failure) -> None:
        self.told.append(failure.code)


def fail_before(run_dir: RunDir, neighbours: Neighbours, error: BaseException) -> int:
    def work() -> int:
        raise error

    return guard.guarded(run_dir, DP2, work, neighbours)


GONE = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]")


@pytest.mark.parametrize(
    ("known", "printed"),
    [("error: rank 1 is dead", "error: rank 1 is dead\n"), ("", ""), (None, "lost contact with another rank")],
    ids=["known", "another speaks", "unknown"],
)
def test_a_lost_rank_is_told_as_the_pulses_know_it(run_dir, rank, capsys, known, printed):
    rank(0)
    assert fail_before(run_dir, Neighbours(known), GONE) == 1
    told = capsys.readouterr().err
    assert printed in told and bool(printed) == bool(told)


def test_a_lost_rank_is_known_also_behind_an_error_of_ours(run_dir, rank, capsys):
    error, neighbours = CheckpointError("a rank was lost while a checkpoint was saved"), Neighbours("error: it is dead")
    error.__cause__ = GONE
    assert fail_before(run_dir, neighbours, error) == 1
    assert neighbours.seen == [str(GONE)] and capsys.readouterr().err == "error: it is dead\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [(MISTAKE, 2), (KeyboardInterrupt(), 130), (ValueError("a bug"), 1)],
    ids=["mistake", "^C", "bug"],
)
def test_whatever_ends_a_rank_is_told_to_the_others(run_dir, error, code):
    neighbours = Neighbours(None)
    fail_before(run_dir, neighbours, error)
    assert neighbours.told == [code]


def test_a_living_run_of_another_start_is_told_to_nobody(run_dir):
    neighbours = Neighbours(None)
    fail_before(run_dir, neighbours, Occupied("a run is alive", "here", "wait"))
    assert neighbours.told == []


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


@pytest.mark.parametrize(
    ("error", "code", "cause"),
    [
        (MISTAKE, 2, "mistake"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("a bug"), 1, "error"),
        (RuntimeError("[gloo] Connection closed by peer [10.0.0.1]"), 1, "lost"),
        (Unmet("3 of 4 ranks came in 600 s", "host:1", "look"), 1, "lost"),
    ],
    ids=["mistake", "^C", "bug", "lost rank", "ranks that do not meet"],
)
def test_the_record_has_the_exit_code_and_the_cause(run_dir, error, code, cause):
    assert fail(run_dir, error) == code
    said = json.loads(run_dir.failure.read_text())
    assert (said["code"], said["cause"], said["step"], said["host"]) == (code, cause, None, socket.gethostname())


@pytest.mark.parametrize(
    ("text", "node"), [("a bug", None), ("CUDA error: uncorrectable ECC error encountered", "node7")]
)
def test_an_error_blames_its_rank_and_broken_hardware_the_node_as_well(run_dir, rank, monkeypatch, text, node):
    rank(1)
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    fail(run_dir, RuntimeError(text))
    said = json.loads(run_dir.failure.read_text())
    assert said["blamed"] == [{"rank": 1, "node": "node7", "state": "failed"}] and said["node"] == node


def test_the_page_begins_with_what_was_said(run_dir, rank):
    rank(0)
    guard.speak(run_dir, Failure(text="error: rank 1 is dead", page="\nrank  node\n"))
    assert run_dir.verdict.read_text() == "error: rank 1 is dead\n\nrank  node\n"


def test_a_start_has_the_name_that_its_launcher_gave_it(rank, monkeypatch):
    rank(0, "12.0.1")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert guard.start_id() == "12.0.1"


def test_ranks_that_an_agent_starts_anew_are_another_start(rank, monkeypatch):
    rank(0, "12.0.1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert guard.start_id() == "12.0.1-1"


def test_the_launcher_is_told_who_has_the_directory(run_dir, rank):
    rank(0, "12.0.1")
    run_dir.launch.mkdir(parents=True)
    fail(run_dir, Occupied("a run is alive", "here", "11.0.1"))
    assert json.loads(run_dir.occupied("12.0.1").read_text()) == {"start": "12.0.1", "owner": "11.0.1"}


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
