from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardforge.checkpoint.store import Store
from shardforge.core.errors import DataError, Problems, RecipeError
from shardforge.core.rundir import RunDir
from shardforge.recipe.load import load
from shardforge.recipe.provenance import dump
from shardforge.train import run
from shardforge.train.lock import Occupied
from shardforge.train.world import World
from tests.tiny import GQA, tiny

ALONE = World(0, 1, torch.device("cpu"), None)
TRAIN = {"steps": 2, "sequences": 8, "seq_len": 16}
CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2},
    "model.hidden": {"model": {"hidden": 32}},
    "model.blocks.one.mixer.heads": {"mixer": GQA | {"heads": 8}},
    "objective.z_loss": {"objective": {"kind": "next_token", "z_loss": 0.1}},
    "data.packing": {"data": {"sources": [{"path": "nowhere"}], "packing": "best_fit"}},
    "train.sequences": {"train": TRAIN | {"sequences": 16}},
    "train.seq_len": {"train": TRAIN | {"seq_len": 8}},
}
"""Field -> a change of it that makes another run."""
FREE: dict[str, dict[str, Any]] = {
    "layout": {"parallel": {"tp": 2}},
    "length": {"train": TRAIN | {"steps": 50}},
    "micro-batch": {"train": TRAIN | {"micro_batch": 2}},
    "rate": {"schedule": {"kind": "cosine", "lr": 0.1}},
    "core": {"model": {"core": "eager"}},
    "longer context": {"mixer": GQA | {"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}}},
    "moved data": {"data": {"sources": [{"path": "elsewhere"}]}},
    "checkpoints": {"checkpoint": {"every": 7}},
}
"""What may change from one start to the next."""


@pytest.fixture
def started(tmp_path) -> RunDir:
    """The directory of a run of the tiny recipe."""
    (tmp_path / "recipe.yaml").write_text(dump(tiny()))
    return RunDir(tmp_path)


def store(fingerprint: str) -> SimpleNamespace:
    return SimpleNamespace(committed=lambda: [3, 7], extra=lambda step: {"data": fingerprint}, load=None, path="there")


def data(fingerprint: str) -> SimpleNamespace:
    return SimpleNamespace(fingerprint=fingerprint, corpora=[SimpleNamespace(path="corpus")])


def test_a_new_directory_takes_any_recipe(tmp_path):
    run.check_same_run(RunDir(tmp_path), tiny())


def test_the_same_recipe_goes_on(started):
    run.check_same_run(started, tiny())


@pytest.mark.parametrize("field", CHANGES)
def test_what_decides_weights_and_data_order_stays_for_life(started, field):
    with pytest.raises(Problems, match=rf"{field}: .* there, .* here(.|\n)*--set run_dir="):
        run.check_same_run(started, tiny(**CHANGES[field]))


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_may_change_and_is_told(started, caplog, name):
    with caplog.at_level(logging.INFO, "shardforge.train"):
        run.check_same_run(started, tiny(**FREE[name]))
    assert "going on with" in caplog.text


def test_all_changes_that_matter_are_told_at_once(started):
    with pytest.raises(Problems) as caught:
        run.check_same_run(started, tiny(seed=2, train=TRAIN | {"seq_len": 8}))
    assert "seed: 1 there, 2 here" in str(caught.value) and "train.seq_len: 16 there, 8 here" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "stays"),
    [
        ("seed", True),
        ("model.hidden", True),
        ("model.core.kind", False),
        ("model.core", False),
        ("model.core_width", True),
        ("model.blocks.far.mixer.position.scaling", False),
        ("model.blocks.far.mixer.position.scaling.factor", False),
        ("model.blocks.far.mixer.position.base", True),
        ("model.blocks.far.mixer.evaluation", False),
        ("model.blocks.far.ffn.scaling", True),
        ("data.sources[0].weight", True),
        ("data.sources[0].path", False),
        ("data.prefetch", False),
        ("train.batch_warmup.start", True),
        ("train.steps", False),
        ("seedling", False),
    ],
)
def test_a_field_is_kept_with_all_below_it(field, stays):
    assert run.kept(field) is stays


@pytest.fixture
def trained(tmp_path):
    """trained("old", run_dir="there"): a folder with a run of one checkpoint; its recipe names another."""

    def make(name: str, run_dir: str | None = None, extra: dict[str, Any] | None = None) -> RunDir:
        made, recipe = RunDir(tmp_path / name), dataclasses.replace(tiny(), run_dir=run_dir)
        made.path.mkdir()
        made.recipe.write_text(dump(recipe))
        store = Store(made.checkpoints, recipe.checkpoint, describe={})
        store.save(4, {"model.a": torch.zeros(1)}, {"data": "x"} if extra is None else extra, wait=True)
        store.close()
        return made

    return make


@pytest.mark.parametrize("named", [None, "elsewhere", "/nowhere/at/all"])
def test_a_run_that_was_moved_does_not_begin_anew_where_it_was(trained, named):
    moved = trained("moved", named)
    with pytest.raises(RecipeError, match=r"step 4 lies here(.|\n)*--set run_dir=.*moved goes on with it here"):
        run.check_place(load(moved.recipe))
    run.check_place(load(moved.recipe, [f"run_dir={moved.path}"]))
    run.check_place(load(moved.recipe, ["run_dir=new"]))


@pytest.mark.parametrize("named", ["moved", "link", "./new/../moved"])
def test_a_run_that_lies_where_its_recipe_says_is_at_home(trained, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    run.check_place(load(trained("moved", named).recipe))


def test_weights_to_start_from_are_no_run_that_was_moved(trained):
    run.check_place(load(trained("weights", extra={}).recipe))


def test_a_recipe_without_checkpoints_beside_it_may_name_any_place(tmp_path):
    (tmp_path / "recipe.yaml").write_text(dump(dataclasses.replace(tiny(), run_dir="anywhere")))
    run.check_place(load(tmp_path / "recipe.yaml"))


def test_a_changed_corpus_is_refused_before_anything_is_loaded():
    with pytest.raises(DataError, match=r"changed since the checkpoint of step 7: fingerprint old then, new now"):
        run.resume(store("old"), SimpleNamespace(load=None), data("new"), ALONE)


def test_the_newest_checkpoint_is_loaded():
    loaded: list[int] = []
    kept = store("same")
    kept.load = lambda step, tensors: loaded.append(step)
    engine = SimpleNamespace(load=lambda read: read({}))
    assert run.resume(kept, engine, data("same"), ALONE) == 7 and loaded == [7]


def test_without_a_checkpoint_a_run_begins_at_step_0():
    assert run.resume(SimpleNamespace(committed=lambda: []), None, data("x"), ALONE) == 0


def test_an_old_stop_request_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARDFORGE_START", raising=False)
    (tmp_path / "STOP").touch()
    run.own(RunDir(tmp_path)).close()
    assert not (tmp_path / "STOP").exists()


def test_a_request_that_came_through_the_launcher_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDFORGE_START", "x")
    (tmp_path / "STOP").touch()
    run.own(RunDir(tmp_path)).close()
    assert (tmp_path / "STOP").exists()


def test_the_stop_request_of_a_living_run_stays(tmp_path, monkeypatch):
    monkeypatch.delenv("SHARDFORGE_START", raising=False)
    with run.own(RunDir(tmp_path)):
        (tmp_path / "STOP").touch()
        with pytest.raises(Occupied):
            run.own(RunDir(tmp_path))
        assert (tmp_path / "STOP").exists()


@pytest.mark.parametrize(("given", "expected"), [(None, "runs/tiny"), ("here", "here")])
def test_a_run_lies_where_the_recipe_says_or_below_its_name(given, expected):
    assert str(run.directory(dataclasses.replace(tiny(), run_dir=given)).path) == expected
