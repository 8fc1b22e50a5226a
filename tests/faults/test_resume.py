"""A run that is killed at any moment, or goes on elsewhere, is the run that was never disturbed."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.faults import runs
from tests.faults.runs import STEPS

pytestmark = pytest.mark.slow

ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
CHAIN = ["dp_shard=2", "dp_shard=2 tp=2", "tp=2", "dp_shard=1"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_operation(run_dir: Path, number: int) -> Callable[[], None]:
    """SIGKILL right before the given operation on a file of the run, in whatever thread."""

    def prepare() -> None:
        count = 0

        def watch(event: str, args: tuple) -> None:
            nonlocal count
            if event in ON_DISK and (isinstance(args[0], int) or str(run_dir) in str(args[0])):
                count += 1
                if count == number:
                    die()

        sys.addaudithook(watch)

    return prepare


def inside_line(number: int) -> Callable[[], None]:
    """SIGKILL when half of the given line of metrics is written."""

    def prepare() -> None:
        write, count = os.write, 0

        def torn(file: int, line: bytes) -> int:
            nonlocal count
            count += line.startswith(b'{"event"')
            if count == number:
                write(file, line[: len(line) // 2])
                die()
            return write(file, line)

        os.write = torn

    return prepare


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The directory of a run of one process that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert runs.run(folder, "train", str(runs.write_recipe(folder))).code == 0
    return folder / "run"


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_moments_ends_as_the_undisturbed_one_to_the_last_bit(tmp_path, undisturbed, seed):
    draw, recipe, kills = random.Random(seed), runs.write_recipe(tmp_path), 0
    while True:
        moment = inside_line(draw.randint(2, 9)) if draw.random() < 0.3 else None
        moment = moment or before_operation(tmp_path / "run", draw.randint(1, 120))
        ended = runs.run(tmp_path, "train", str(recipe), prepare=moment)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended
        kills += 1
        assert kills < 60, "the run makes no progress"
    assert kills >= 3
    assert runs.losses(tmp_path / "run") == runs.losses(undisturbed)
    assert runs.held_out(tmp_path / "run")[-1:] == runs.held_out(undisturbed)
    assert same(runs.saved(tmp_path / "run", STEPS), runs.saved(undisturbed, STEPS))


@pytest.mark.parametrize("name", ["recipe.yaml", "origins.json", "provenance.json", "stopped.json"])
def test_what_a_start_writes_again_is_replaced_whole(tmp_path, name):
    """A second name of the old file keeps the old text, so there was no moment in which the file was half new."""
    recipe = str(runs.write_recipe(tmp_path))
    assert runs.run(tmp_path, "train", recipe, "--set", "train.steps=3").code == 0
    before = (tmp_path / "run" / name).read_text()
    os.link(tmp_path / "run" / name, tmp_path / "old")
    assert runs.run(tmp_path, "train", recipe, "--set", "train.steps=4", "--set", "seed=3").code == 0
    assert (tmp_path / "old").read_text() == before != (tmp_path / "run" / name).read_text()


def test_two_processes_killed_together_go_on_to_the_last_bit(ranks, tmp_path):
    recipe = str(runs.write_recipe(tmp_path, parallel={"dp_shard": 2}))
    elsewhere = tmp_path / "undisturbed"
    assert ranks(2).run(runs.turn, recipe, f"run_dir={elsewhere}") == ["finished"] * 2
    with runs.shardforge(tmp_path, "train", recipe) as first:
        first.until(lambda: len(runs.losses(tmp_path / "run")) >= 3)
        first.kill()
    assert len(runs.losses(tmp_path / "run")) < STEPS, "the kill came too late to prove anything"
    with runs.shardforge(tmp_path, "train", recipe) as second:
        ended = second.ended()
    assert ended.code == 0, ended
    assert runs.losses(tmp_path / "run") == runs.losses(elsewhere)
    assert same(runs.saved(tmp_path / "run", STEPS), runs.saved(elsewhere, STEPS))


@pytest.mark.parametrize(("master", "tolerance"), [("fp32", 1e-4), ("fp64", 1e-9)])
def test_a_run_that_moves_from_layout_to_layout_keeps_its_losses(ranks, tmp_path, master, tolerance):
    recipe = runs.write_recipe(tmp_path, precision={"master": master, "compute": master, "reduce": master})
    whole = tmp_path / "whole"
    assert ranks(1).run(runs.turn, recipe, f"run_dir={whole}") == ["finished"]
    for number, layout in enumerate(CHAIN, 1):
        degrees = dict(part.split("=") for part in layout.split())
        size = int(degrees.get("dp_shard", 1)) * int(degrees.get("tp", 1))
        sets = [f"parallel.{axis}={degree}" for axis, degree in degrees.items()]
        last = f"train.steps={STEPS * number // len(CHAIN)}"
        assert ranks(size).run(runs.turn, recipe, last, *sets) == ["finished"] * size
    moved, expected = runs.losses(tmp_path / "run"), runs.losses(whole)
    assert moved.keys() == expected.keys()
    for step, (loss, norm) in expected.items():
        assert moved[step] == pytest.approx((loss, norm), rel=tolerance), f"step {step}"
    assert runs.held_out(tmp_path / "run")[-1] == pytest.approx(runs.held_out(whole)[-1], rel=tolerance)
