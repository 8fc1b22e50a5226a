"""A second start in the directory of a living run is refused, and the first one does not notice."""

from __future__ import annotations

import json
import time

import pytest

from shardforge.train import lock
from tests.faults import runs

pytestmark = pytest.mark.slow

FOR_EVER = {"train": {"steps": 10**6, "sequences": 4, "seq_len": 16, "eval_sequences": 0}, "checkpoint": {"every": 0}}


def test_every_second_start_is_refused_and_the_first_run_goes_on(tmp_path):
    recipe, run_dir = str(runs.write_recipe(tmp_path, **FOR_EVER)), tmp_path / "run"
    with runs.shardforge(tmp_path, "train", recipe) as first:
        first.until(lambda: bool(runs.losses(run_dir)))
        owner = json.loads((run_dir / "lock").read_text())["pid"]
        before = {name: digest for name, digest in runs.contents(run_dir).items() if name != "metrics.jsonl"}
        for layout in ("dp_shard=1", "dp_shard=2"):
            ended = runs.run(tmp_path, "train", recipe, "--set", f"parallel.{layout}", "--set", "train.steps=7")
            assert ended.code == 2
            assert ended.err.count("error:") == 1 and "Traceback" not in ended.err
            assert f"a run is alive in this directory (process {owner} on " in ended.err
        after = {name: digest for name, digest in runs.contents(run_dir).items() if name != "metrics.jsonl"}
        assert after == before and not (run_dir / "failure.json").exists()
        assert json.loads((run_dir / "lock").read_text())["pid"] == owner
        reached = max(runs.losses(run_dir))
        first.until(lambda: max(runs.losses(run_dir)) > reached)
        (run_dir / "STOP").touch()
        assert first.ended().code == 0
    assert json.loads((run_dir / "stopped.json").read_text())["state"] == "stopped"


def test_a_run_whose_directory_has_changed_hands_ends_and_writes_nothing_more(tmp_path):
    """As after a network cut: another machine found the lease stale, and has taken it."""

    def beats_often() -> None:
        lock.BEAT_S = 0.05

    recipe, run_dir = str(runs.write_recipe(tmp_path, **FOR_EVER)), tmp_path / "run"
    first = runs.fork(tmp_path, "train", recipe, prepare=beats_often)
    try:
        deadline = time.monotonic() + runs.PATIENCE_S
        while not runs.losses(run_dir):
            assert first.is_alive() and time.monotonic() < deadline
        other = json.dumps({"host": "far", "pid": 7, "start": "", "machine": "another", "id": "x"})
        (run_dir / "lock").write_text(other)
        first.join(runs.PATIENCE_S)
        assert first.exitcode == 2
        told = (tmp_path / "child.err").read_text()
        assert "the run directory has changed hands" in told and "process 7 on far has it" in told
        assert (run_dir / "lock").read_text() == other
        assert not any((run_dir / name).exists() for name in ("failure.json", "stopped.json", "verdict.txt"))
    finally:
        first.kill()
        first.join()


def test_a_second_launch_by_torchrun_is_refused_with_one_message(tmp_path):
    recipe, run_dir = str(runs.write_recipe(tmp_path, **FOR_EVER)), tmp_path / "run"
    first = runs.fork(tmp_path, "train", recipe)
    try:
        words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shardforge")
        with runs.Command(
            tmp_path, runs.sys.executable, *words, "train", recipe, "--set", "parallel.dp_shard=2"
        ) as second:
            second.until(lambda: bool(runs.losses(run_dir)))
            ended = second.ended()
        assert ended.code != 0
        assert ended.err.count("a run is alive in this directory") == 1, ended.err
        assert first.is_alive() and not (run_dir / "failure.json").exists()
    finally:
        first.kill()
        first.join()
