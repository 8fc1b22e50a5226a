from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from shardforge.plan.drawing import FILL, draw
from tests.unit.plan.conftest import Run


def share(picture: np.ndarray, color: str) -> float:
    """Share of the pixels that have a color."""
    return float((np.abs(picture[..., :3] - np.array(to_rgb(color))).max(-1) < 0.01).mean())


def test_actions_have_the_colors_of_their_work(tmp_path: Path, timeline: Run):
    draw(tmp_path / "x.png", [timeline("1f1b", 2, 4)], [["2", "1"]])
    seen = imread(tmp_path / "x.png")
    areas = {work: share(seen, color) for work, color in FILL.items()}
    assert areas["B"] > 1.5 * areas["F"] > 0.1  # twice as long
    assert areas["W"] == 0


def test_each_schedule_has_a_panel(tmp_path: Path, timeline: Run):
    found = [timeline(name, 2, 4) for name in ("gpipe", "zbv")]
    draw(tmp_path / "one.png", found[:1], [["4", "4"]])
    draw(tmp_path / "new" / "two.png", found, [["4", "4"], ["2", "2"]])
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "new" / "two.png")
    assert two.shape[0] > 1.4 * one.shape[0] and two.shape[1] == one.shape[1]
    assert share(two, FILL["W"]) > 0.02
