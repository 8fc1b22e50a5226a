from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from shardforge.core.rundir import RunDir
from shardforge.launch import local

WORDS = ["train", "x.yaml"]
REAL = "import sys; from pathlib import Path; from shardforge.core.rundir import RunDir; " + (
    "from shardforge.launch.local import launch; sys.exit(launch(['--version'], 2, RunDir(Path(sys.argv[1]))))"
)


@pytest.fixture
def agent(monkeypatch, tmp_path) -> dict[str, Any]:
    """Stands for torch's agent: what it was started with; `do` is what happens while the ranks run."""
    seen: dict[str, Any] = {"do": lambda: None}

    def elastic_launch(config: api.LaunchConfig, entry: str) -> Callable[..., None]:
        def run(*words: str) -> None:
            seen.update(config=config, command=[entry, *words], start=os.environ["SHARDFORGE_START"])
            seen["do"]()

        return run

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    for name in ("SHARDFORGE_START", "OMP_NUM_THREADS", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return seen


def failing(code: int, rank: int = 1) -> Callable[[], None]:
    def do() -> None:
        raise ChildFailedError("shardforge", {rank: ProcessFailure(rank, 1, code, error_file="")})

    return do


def launch(tmp_path: Path) -> int:
    return local.launch(WORDS, 3, RunDir(tmp_path))


def test_every_rank_runs_this_python_with_the_same_words(agent, tmp_path):
    assert launch(tmp_path) == 0
    assert agent["command"] == [sys.executable, "-m", "shardforge", *WORDS]
    assert (agent["config"].nproc_per_node, agent["config"].max_restarts) == (3, 0)


def test_every_start_has_a_name_of_its_own(agent, tmp_path):
    names = {(launch(tmp_path), agent["start"], agent["config"].run_id) for _ in range(2)}
    assert len(names) == 2 and all(start == run_id for _, start, run_id in names)


@pytest.mark.parametrize(("given", "threads"), [(None, str(max(1, (os.cpu_count() or 1) // 3))), ("5", "5")])
def test_ranks_share_the_cores_unless_told_otherwise(agent, tmp_path, monkeypatch, given, threads):
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    launch(tmp_path)
    assert os.environ["OMP_NUM_THREADS"] == threads


@pytest.mark.parametrize("number", local.ASKING, ids=lambda number: number.name)
def test_a_signal_becomes_the_stop_file(agent, tmp_path, number):
    agent["do"] = lambda: signal.raise_signal(number)
    assert launch(tmp_path / "new") == 0
    assert (tmp_path / "new" / "STOP").exists()


def test_a_second_interrupt_ends_the_ranks_at_once(agent, tmp_path):
    agent["do"] = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path)


@pytest.mark.parametrize("number", local.ASKING, ids=lambda number: number.name)
def test_handlers_from_before_return(agent, tmp_path, number):
    before = signal.getsignal(number)
    agent["do"] = failing(1)
    launch(tmp_path)
    assert signal.getsignal(number) is before


def test_the_exit_code_is_that_of_the_rank_that_failed_and_its_words_are_its_own(agent, tmp_path, capsys):
    agent["do"] = failing(2)
    assert launch(tmp_path) == 2
    assert capsys.readouterr().err == ""


def test_a_rank_that_a_signal_ended_is_named(agent, tmp_path, capsys):
    agent["do"] = failing(-signal.SIGKILL)
    (tmp_path / "failure.json").write_text(json.dumps({"start": "an earlier one"}))
    assert launch(tmp_path) == 128 + signal.SIGKILL
    assert "error: " in (told := capsys.readouterr().err) and "rank 1 was ended by SIGKILL" in told


def test_nothing_is_added_when_another_rank_has_told_of_it(agent, tmp_path, capsys):
    def do() -> None:
        (tmp_path / "failure.json").write_text(json.dumps({"start": os.environ["SHARDFORGE_START"]}))
        failing(-signal.SIGKILL)()

    agent["do"] = do
    assert launch(tmp_path) == 128 + signal.SIGKILL
    assert capsys.readouterr().err == ""


def test_two_processes_really_run(tmp_path):
    done = subprocess.run([sys.executable, "-c", REAL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["shardforge"] * 2
