from __future__ import annotations

import base64
import math
from pathlib import Path

import pytest

from shardforge.observe import expert_page, page
from shardforge.observe.jsonl import read
from tests.unit.observe.test_page import Page


@pytest.fixture
def history(tmp_path: Path, write_mixture):
    return read(write_mixture(tmp_path, range(1, 11), lost_at=6))


def test_the_page_draws_the_sums_over_layers(history):
    drawn = Page(page.html([history], [{}])).data["runs"][0]["y"]
    assert drawn["dead"] == [0] * 5 + [2] * 5 and drawn["max_vio"] == pytest.approx([2.2] * 5 + [2.8] * 5)
    assert "drop_rate" not in drawn and "bias_low" not in drawn


def test_the_page_has_each_layer_over_the_steps(history):
    told = Page(page.html([history], [{}])).data["runs"][0]["experts"]
    assert told["layers"] == [1, 3] and told["steps"] == list(range(1, 11))
    assert told["rows"]["dead"] == [[0] * 10, [0] * 5 + [2] * 5]
    assert told["similarity"]["rows"] == [[0.125] * 10, [step / 10 for step in range(1, 11)]]


def test_loads_are_written_within_a_fiftieth_and_dead_experts_as_such(history):
    picture = Page(page.html([history], [{}])).data["runs"][0]["experts"]["pictures"][-1]
    levels = base64.b64decode(picture["rows"][1])
    loads = [0.0 if level == 0 else 2 ** ((level - expert_page.EVEN) / expert_page.OCTAVE) for level in levels]
    assert loads[2:] == [0.0, 0.0] and loads[:2] == pytest.approx([3.8, 0.2], rel=0.02)


def test_the_script_reads_loads_as_they_were_written():
    script = page.files("shardforge.observe").joinpath("experts.js").read_text()
    assert f"EVEN = {expert_page.EVEN}, OCTAVE = {expert_page.OCTAVE}" in script


def test_a_long_run_keeps_the_worst_of_each_stretch(tmp_path: Path, write_mixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_page, "COLUMNS", 4)
    monkeypatch.setattr(expert_page, "PICTURES", 5)
    history = read(write_mixture(tmp_path, range(1, 101), lost_at=75))
    told = expert_page.section(history, history.experts)
    assert (told["steps"], told["rows"]["dead"][1]) == ([1, 26, 51, 76], [0, 0, 2, 2])
    assert [picture["step"] for picture in told["pictures"]] == [1, 26, 51, 75, 100]


def test_many_loads_leave_room_for_fewer_pictures(history, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(expert_page, "LOADS", 32)  # 8 a picture
    assert len(expert_page.section(history, history.experts)["pictures"]) == 4


def test_what_is_not_finite_is_a_gap(history):
    history.experts.series["entropy_share"][3, 0] = math.nan
    assert expert_page.section(history, history.experts)["rows"]["entropy_share"][0][3] is None


def test_a_page_of_runs_without_experts_has_nothing_of_them(tmp_path: Path, write_life, history):
    dense = read(write_life(tmp_path / "dense", [1, 2]))
    text = page.html([dense], [{}])
    assert "mixtures" not in text and "experts" not in Page(text).data["runs"][0]
    both = Page(page.html([dense, history], [{}, {}]))
    assert ["experts" in run for run in both.data["runs"]] == [False, True]


def test_the_script_writes_text_and_never_markup():
    script = page.files("shardforge.observe").joinpath("experts.js").read_text()
    assert not any(word in script for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"))
