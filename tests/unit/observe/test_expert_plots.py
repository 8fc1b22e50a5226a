from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shardforge.observe.expert_plots import experts_png
from shardforge.observe.jsonl import read

DEAD, EVEN, FULL = "#000000", "#e2e8f0", "#dc2626"


def counted(path: Path, color: str) -> int:
    image = (imread(path)[..., :3] * 255).round().astype(int)
    return int((np.abs(image - struct.unpack("BBB", bytes.fromhex(color[1:]))) <= 2).all(-1).sum())


def drawn(folder: Path, *metrics: Path) -> Path:
    experts_png(folder / "experts.png", [read(path) for path in metrics])
    return folder / "experts.png"


def test_dead_experts_are_black_where_they_are_dead(tmp_path: Path, write_mixture):
    well = drawn(tmp_path / "a", write_mixture(tmp_path / "a", range(1, 11)))
    lost = drawn(tmp_path / "b", write_mixture(tmp_path / "b", range(1, 11), lost_at=6))
    # of 8 cells a picture the last of 3 has 2 black ones, each above 70 x 150 pixels
    assert counted(lost, DEAD) - counted(well, DEAD) > 2 * 70 * 150


def test_an_even_layer_is_gray(tmp_path: Path, write_mixture):
    assert counted(drawn(tmp_path, write_mixture(tmp_path, [1, 2, 3])), EVEN) > 3 * 4 * 70 * 150


def test_every_run_has_its_own_row(tmp_path: Path, write_mixture):
    paths = [write_mixture(tmp_path / name, range(1, 6), name=name) for name in ("a", "b")]
    heights = [imread(drawn(tmp_path / str(count), *paths[:count])).shape[0] for count in (1, 2)]
    assert heights[1] - heights[0] > 400


@pytest.mark.parametrize("steps", [[1], range(1, 800)], ids=["one", "many"])
def test_runs_of_any_length_are_drawn(tmp_path: Path, write_mixture, steps):
    assert drawn(tmp_path, write_mixture(tmp_path, steps)).stat().st_size > 20_000


def test_a_life_that_told_nothing_of_experts_is_a_gap(tmp_path: Path, write_life, write_mixture):
    write_life(tmp_path, [1, 2], verdict="")
    assert drawn(tmp_path, write_mixture(tmp_path, [3, 4], first_step=2)).stat().st_size > 20_000
