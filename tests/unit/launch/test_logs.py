from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardforge.core.errors import LaunchError
from shardforge.core.rundir import RunDir
from shardforge.launch import history, logs
from shardforge.launch.history import Attempt
from shardforge.launch.logs import Log, find, follow, last


@pytest.fixture
def run(tmp_path) -> RunDir:
    """Two attempts with logs of ranks, and the log of their job."""
    found = RunDir(tmp_path / "sweep" / "run")
    history.append(found.jobs, {"job": "7", "ranks": 2})
    for start in ("7.0.0", "7.1.0"):
        history.begun(found.attempts, Attempt(start=start, job="7", time=1.0))
        put(found.logs / start / "rank-0.log", f"zero of {start}\n")
        put(found.logs / start / "rank-0011.log", f"eleven of {start}\n")
    put(found.logs / "job-7.log", "the job\n")
    return found


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("rank", "start", "name"),
    [
        (None, None, "job-7.log"),
        (0, None, "7.1.0/rank-0.log"),
        (11, None, "7.1.0/rank-0011.log"),
        (11, "7.0.0", "7.0.0/rank-0011.log"),
    ],
)
def test_the_log_of_a_rank_is_that_of_the_last_attempt_unless_another_is_named(run, rank, start, name):
    assert find(run, rank, start) == Log(run.logs / name)


def test_an_attempt_that_has_left_no_logs_yet_is_passed_over(run):
    history.begun(run.attempts, Attempt(start="7.2.0", job="7", time=2.0))
    assert find(run, 0).path.parent.name == "7.1.0"


def test_of_several_jobs_the_newest_log_counts(run):
    put(run.logs / "job-8.log", "")
    os.utime(run.logs / "job-8.log", (2e9, 2e9))
    assert find(run).path.name == "job-8.log"


def test_the_job_log_of_an_arrays_element_lies_with_the_array(tmp_path):
    run = RunDir(tmp_path / "sweep" / "arm")
    history.append(run.jobs, {"job": "9_1"})
    put(tmp_path / "sweep" / "launch" / "logs" / "job-9_0.log", "")
    put(tmp_path / "sweep" / "launch" / "logs" / "job-9_1.log", "")
    assert find(run).path.name == "job-9_1.log"


@pytest.mark.parametrize(("rank", "node", "local"), [(0, "node-0.log", 0), (3, "node-1.log", 1)])
def test_under_torchrun_a_rank_is_some_lines_of_its_nodes_log(run, rank, node, local):
    folder = run.logs / "8.0.0"
    put(folder / "node-0.log", "[default0]:zero\n[default1]:one\n")
    put(folder / "node-1.log", "[default0]:two\nagent\n[default1]:three\n[default1]:end\n")
    log = find(run, rank, "8.0.0")
    assert (log.path.name, log.local_rank) == (node, local)
    assert last(log, 9)[0] == (["zero"] if rank == 0 else ["three", "end"])


@pytest.mark.parametrize(
    ("rank", "start", "words"),
    [
        (5, None, "there is no log of rank 5"),
        (0, "1.0.0", "there are: 7.0.0, 7.1.0"),
        (None, "7.0.0", "name one with --rank"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(run, rank, start, words):
    with pytest.raises(LaunchError) as error:
        find(run, rank, start)
    assert words in str(error.value)


@pytest.mark.parametrize("rank", [None, 0])
def test_a_run_without_slurm_has_no_logs(tmp_path, rank):
    with pytest.raises(LaunchError, match="where it was started"):
        find(RunDir(tmp_path), rank)


@pytest.mark.parametrize("lines", [0, 1, 3, 99])
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_the_last_lines_are_whole_whatever_is_read_at_once(tmp_path, monkeypatch, lines, block):
    monkeypatch.setattr(logs, "BLOCK_BYTES", block)
    path = tmp_path / "x.log"
    rows = [f"line {number} ä" for number in range(20)]
    put(path, "\n".join(rows) + "\n")
    assert last(Log(path), lines) == (rows[-lines:] if lines else rows, path.stat().st_size)


def test_an_empty_log_has_no_lines(tmp_path):
    put(tmp_path / "x.log", "")
    assert last(Log(tmp_path / "x.log"), 5) == ([], 0)


def test_what_is_followed_is_told_as_it_comes_also_of_a_later_attempt(tmp_path):
    first, second = Log(tmp_path / "a.log"), Log(tmp_path / "b.log")
    put(first.path, "old\nnew\nha")
    current = [first]

    def more() -> None:
        with first.path.open("a") as file:
            file.write("lf\n")

    def another() -> None:
        put(second.path, "again\n")
        current[0] = second

    news = iter([more, another])
    told = follow(lambda: current[0], first, len("old\n"), lambda: next(news)())
    assert [next(told) for _ in range(4)] == ["new", "half", f"== {second.path}", "again"]
