from __future__ import annotations

import shutil

import pytest
import torch

from shardforge.checkpoint import audit
from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.open import open_source
from shardforge.families.shardforge import RunSource
from shardforge.recipe.load import load
from shardforge.recipe.provenance import plain


def same(source, weights) -> bool:
    read = {name: source.read(name) for name in source.names}
    return read.keys() == weights.keys() and all(torch.equal(read[name], weights[name]) for name in weights)


@pytest.mark.parametrize("where", [".", "checkpoints", "checkpoints/step-00000005"])
def test_the_newest_step_of_a_run_is_read(run_of, where):
    run, weights = run_of(steps=(1, 5))
    assert same(open_source(run.path / where), weights)


def test_a_step_folder_is_read_as_that_step(run_of):
    run, newest = run_of(steps=(1, 5))
    source = open_source(run.checkpoints / "step-00000001")
    assert isinstance(source, RunSource) and source.step == 1 and not same(source, newest)


def test_the_model_is_the_one_of_the_recipe_of_the_run(run_of):
    run, _ = run_of(model={"hidden": 8})
    assert open_source(run.path).model == plain(load(run.recipe).recipe.model)


def test_a_step_folder_with_a_recipe_of_its_own_is_read_anywhere(run_of, tmp_path):
    run, weights = run_of()
    alone = shutil.copytree(run.checkpoints / "step-00000001", tmp_path / "alone" / "step-00000001")
    shutil.copy(run.recipe, alone)
    assert same(open_source(alone), weights)


def test_a_step_folder_without_any_recipe_says_where_one_has_to_be(run_of, tmp_path):
    run, _ = run_of()
    alone = shutil.copytree(run.checkpoints / "step-00000001", tmp_path / "far" / "off" / "step-00000001")
    with pytest.raises(CheckpointError, match=r"no recipe.yaml(.|\n)*put a copy"):
        open_source(alone)


def test_shapes_and_types_are_told_without_reading(run_of, monkeypatch):
    run, weights = run_of()
    monkeypatch.setattr("shardforge.families.shardforge.stored", None)
    names = open_source(run.path).names
    told = {name: (info.shape, info.dtype) for name, info in names.items()}
    assert told == {name: (tuple(weight.shape), "float32") for name, weight in weights.items()}


def test_what_the_optimizer_kept_is_given(run_of):
    run, weights = run_of(optimizer=True)
    source = open_source(run.path)
    assert source.moments == ("exp_avg", "exp_avg_sq")
    assert all(source.read_moment("exp_avg", name).shape == weight.shape for name, weight in weights.items())


def test_a_moment_that_is_missing_of_one_weight_is_a_problem_for_whoever_reads_moments(run_of, monkeypatch):
    run, weights = run_of(optimizer=True)
    real = audit.opened

    def opened(folder):
        manifest, entries = real(folder)
        return manifest, {name: entry for name, entry in entries.items() if name != "optim.norm.weight.exp_avg_sq"}

    monkeypatch.setattr(audit, "opened", opened)
    source = open_source(run.path)
    assert source.moments == ("exp_avg", "exp_avg_sq") and same(source, weights)
    for read in (
        lambda: source.read_moment("exp_avg", "embed.weight"),
        lambda: next(source.boxes("embed.weight", "step")),
    ):
        with pytest.raises(Problems, match=r"exp_avg_sq of norm.weight is missing"):
            read()


def test_without_an_optimizer_there_are_no_moments(run_of):
    run, _ = run_of()
    assert open_source(run.path).moments == ()


def test_a_run_that_has_saved_nothing_says_so(run_of):
    run, _ = run_of(steps=())
    run.checkpoints.mkdir()
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        open_source(run.path)


def test_a_step_that_was_not_committed_is_refused(run_of):
    run, _ = run_of()
    (run.checkpoints / "step-00000001" / "COMMITTED").unlink()
    with pytest.raises(CheckpointError, match="COMMITTED is missing"):
        open_source(run.checkpoints / "step-00000001")


def test_a_damaged_checkpoint_is_refused(run_of):
    run, _ = run_of()
    file = run.checkpoints / "step-00000001" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"damaged(.|\n)*rank-00000.safetensors has"):
        open_source(run.path)


def test_what_is_recognised_as_nothing_says_what_would_be(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights are recognised(.|\n)*config.json"):
        open_source(tmp_path)


def test_a_path_to_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is nothing here"):
        open_source(tmp_path / "missing")


def test_reading_leaves_the_files_as_they_are(run_of):
    run, weights = run_of()
    source = open_source(run.path)
    for name in source.names:
        source.read(name).zero_()
    assert same(open_source(run.path), weights)
