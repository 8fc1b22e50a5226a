from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from shardforge.observe.jsonl import read
from shardforge.observe.plots import COLORS, loss_png, smooth


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)


def rgb(color: str) -> tuple[int, ...]:
    return struct.unpack("BBB", bytes.fromhex(color[1:]))


@pytest.fixture
def histories(tmp_path: Path, write_life):
    first, second = tmp_path / "a", tmp_path / "b"
    write_life(first, range(1, 6), verdict="", evals=[3])
    return [read(write_life(first, range(4, 9), first_step=3)), read(write_life(second, range(1, 9), shift=2.0))]


@pytest.mark.parametrize("logarithmic", [False, True])
def test_the_picture_has_the_colors_of_both_runs(tmp_path: Path, histories, logarithmic: bool):
    loss_png(tmp_path / "loss.png", histories, logarithmic=logarithmic)
    image = pixels(tmp_path / "loss.png")
    assert image.shape == (900, 1350, 3)
    assert all((image == rgb(color)).all(-1).sum() > 500 for color in COLORS[:2])


def test_the_axes_change_with_the_scale(tmp_path: Path, histories):
    loss_png(tmp_path / "linear.png", histories)
    loss_png(tmp_path / "log.png", histories, logarithmic=True)
    assert (pixels(tmp_path / "linear.png") != pixels(tmp_path / "log.png")).any()


@pytest.mark.parametrize("name", ["$x^", "_hidden", "<b>", "a\nb", "ß"])
def test_any_name_is_drawn(tmp_path: Path, write_life, name: str):
    loss_png(tmp_path / "loss.png", [read(write_life(tmp_path, [1, 2], name=name))])
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_hardly_begun_is_drawn(tmp_path: Path, write_life, steps: int):
    loss_png(tmp_path / "loss.png", [read(write_life(tmp_path, range(1, 1 + steps), verdict=""))])
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_smoothing_a_straight_line_moves_its_middle_nowhere():
    line = [float(value) for value in range(101)]
    assert smooth(line, 5)[50] == pytest.approx(50, abs=1e-3)


def test_a_span_of_one_changes_nothing():
    assert smooth([3.0, 1.0, 2.0], 1) == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("values", [[math.nan, 5.0, 1.0], [5.0, math.inf, 1.0], [5.0, math.nan], [math.nan]])
@pytest.mark.parametrize("span", [1, 3])
def test_what_is_not_finite_stays_a_gap_and_touches_no_other_place(values: list[float], span: int):
    assert [math.isnan(value) for value in smooth(values, span)] == [not math.isfinite(value) for value in values]
