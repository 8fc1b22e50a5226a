from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shardforge.observe import health
from shardforge.observe.expert_history import SERIES
from shardforge.observe.jsonl import read


@pytest.fixture
def experts(tmp_path: Path, write_mixture):
    return read(write_mixture(tmp_path, range(1, 11), lost_at=6)).experts


def test_series_have_a_row_a_step_and_a_column_a_layer(experts):
    assert experts.layers == [1, 3] and {experts.series[name].shape for name in SERIES} == {(10, 2)}
    assert experts.series["max_vio"][:, 1].tolist() == pytest.approx([2.2] * 5 + [2.8] * 5)


def test_sums_are_over_the_layers_of_a_step(experts):
    assert experts.total("dead") == [0.0] * 5 + [2.0] * 5
    assert experts.most("max_vio")[-1] == pytest.approx(2.8)
    assert experts.least("max_vio") == [0.0] * 10
    assert experts.mean("max_vio")[0] == pytest.approx(1.1)


def test_there_is_nothing_to_see_of_drops_and_biases_that_never_were(experts):
    assert [name for name in SERIES if experts.told(name)] == ["count", "max_vio", "dead", "entropy_share"]


def test_pictures_have_the_loads_of_every_layer(experts):
    assert [picture.step for picture in experts.pictures] == list(range(1, 11))
    np.testing.assert_allclose(experts.pictures[-1].relative, [[1, 1, 1, 1], [3.8, 0.2, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(("most", "steps"), [(3, [1, 5, 10]), (2, [1, 10]), (1, [10]), (20, list(range(1, 11)))])
def test_the_first_and_the_last_picture_are_among_the_chosen(experts, most, steps):
    assert [picture.step for picture in experts.chosen(most)] == steps


def test_rare_pictures_stand_at_the_start_of_a_life_and_at_the_end(
    tmp_path: Path, write_mixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(health, "LOADS", 2)  # of 8: every fourth step
    write_mixture(tmp_path, range(1, 7))
    path = write_mixture(tmp_path, range(6, 11), first_step=5)
    assert [picture.step for picture in read(path).experts.pictures] == [1, 4, 6, 8, 10]


def test_a_life_that_told_nothing_of_experts_leaves_a_gap(tmp_path: Path, write_life, write_mixture):
    write_life(tmp_path, [1, 2], verdict="")
    history = read(write_mixture(tmp_path, [3, 4], first_step=2))
    assert np.isnan(history.experts.series["max_vio"][:, 1]).tolist() == [True, True, False, False]


def test_a_run_without_experts_has_no_such_history(tmp_path: Path, write_life):
    assert read(write_life(tmp_path, [1, 2])).experts is None


def test_similarities_are_read_by_layer(tmp_path: Path, write_mixture):
    assert read(write_mixture(tmp_path, [1, 2])).evals[-1].similarity == {1: 0.125, 3: 0.2}


def test_a_reader_of_before_finds_every_field_that_it_knew(tmp_path: Path, write_life, write_mixture):
    old, new = (
        {event["event"]: event for event in map(json.loads, path.read_text().splitlines())}
        for path in (write_life(tmp_path / "old", [1], evals=[1]), write_mixture(tmp_path / "new", [1]))
    )
    assert {kind: set(event) - set(new[kind]) for kind, event in old.items() if kind in new} == {
        kind: set() for kind in old if kind in new
    }
