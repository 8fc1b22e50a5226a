from __future__ import annotations

import json
import shutil

import pytest
import torch

from shardforge.checkpoint import folders
from shardforge.checkpoint.audit import audit
from shardforge.core.rundir import RunDir
from shardforge.data.synthetic import markov
from shardforge.families.open import open_source
from shardforge.recipe.load import load
from tests.faults import runs
from tests.unit.convert.folders import converted, weights
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps whose checkpoints of step 6 and 12 are there."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = runs.write_recipe(folder, checkpoint={"every": 6, "keep_last": 9})
    assert runs.run(folder, "train", str(recipe)).code == 0
    return folder / "run"


def half(trained):
    return RunDir(trained).checkpoints / folders.name(6)


def manifest(made):
    return folders.read_manifest(open_source(made.path).path)


def test_a_run_goes_on_with_the_losses_of_the_one_that_stayed(trained, tmp_path):
    made = converted(half(trained), tmp_path / "moved", "shardforge")
    assert made.certificate["left"] == []
    ended = runs.run(tmp_path, "train", str(made.path / "recipe.yaml"))
    assert ended.code == 0, ended.err
    stayed, moved = runs.losses(trained), runs.losses(made.path)
    assert moved.keys() == set(range(7, 13))
    assert moved == {step: stayed[step] for step in moved}


def test_a_run_that_was_moved_afterwards_goes_on_where_it_lies_and_nowhere_else(trained, tmp_path):
    made = converted(half(trained), tmp_path / "made", "shardforge")
    moved = made.path.rename(tmp_path / "elsewhere")
    ended = runs.run(tmp_path, "train", str(moved / "recipe.yaml"))
    assert ended.code == 2 and f"--set run_dir={moved}" in ended.err and not made.path.exists()
    ended = runs.run(tmp_path, "train", str(moved), "--set", f"run_dir={moved}")
    assert ended.code == 0, ended.err
    stayed, losses = runs.losses(trained), runs.losses(moved)
    assert losses == {step: stayed[step] for step in range(7, 13)}


def test_its_optimizer_state_is_the_same_to_the_bit(trained, tmp_path):
    made = converted(half(trained), tmp_path / "moved", "shardforge")
    one, other = open_source(half(trained)), open_source(made.path)
    assert one.moments == other.moments == ("exp_avg", "exp_avg_sq") and other.counts == ("step",)
    for kind in (*one.moments, *one.counts):
        assert all(torch.equal(one.read_moment(kind, name), other.read_moment(kind, name)) for name in one.names)


@pytest.mark.parametrize("asked", [{"moments": "drop"}, {"dtype": "bf16"}], ids=str)
def test_a_run_that_cannot_go_on_becomes_a_start_and_says_why(trained, tmp_path, asked):
    made = converted(half(trained), tmp_path / "moved", "shardforge", **asked)
    recipe = load(made.path / "recipe.yaml").recipe
    assert recipe.train.start == str(made.path) and recipe.run_dir is None
    assert "data" not in manifest(made)["extra"]
    (line,) = [line for line in made.certificate["left"] if "gone on with" in line]
    assert "optim." in line or "bfloat16" in line


def test_a_start_from_published_weights_is_trained(published, tmp_path):
    """Its recipe lacks nothing but a corpus; the rest here only makes the run small."""
    made = converted(published, tmp_path / "ours", "shardforge")
    markov(tmp_path / "corpus", vocab=32, documents=40, tokens=30)
    sets = [f"data.sources.0.path={tmp_path / 'corpus'}", f"run_dir={tmp_path / 'new'}", "train.steps=2"]
    sets += ["train.sequences=2", "train.seq_len=8", "train.eval_sequences=2", "schedule.warmup=1"]
    words = [word for each in sets for word in ("--set", each)]
    ended = runs.run(tmp_path, "train", str(made.path / "recipe.yaml"), *words)
    assert ended.code == 0, ended.err
    assert "step 0 begins with the weights" in ended.err


def test_a_layout_stands_in_the_recipe(trained, tmp_path):
    made = converted(half(trained), tmp_path / "moved", "shardforge", layout={"tp": 2, "pp": 2})
    assert str(load(made.path / "recipe.yaml").recipe.parallel) == "pp2-tp2"


def test_the_checkpoint_is_sound(published, tmp_path):
    made = converted(published, tmp_path / "ours", "shardforge", shard_bytes=6000)
    step = open_source(made.path).path
    assert len(list(step.glob("*.safetensors"))) > 2 and audit(step).problems == ()


def test_special_tokens_length_and_tokenizer_come_along(published, tmp_path):
    beside = open_source(converted(published, tmp_path / "ours", "shardforge").path).beside
    assert beside.tokens == {"bos_token_id": 1, "eos_token_id": [2, 3]} and beside.length == 16
    assert [file.name for file in beside.tokenizer] == ["generation_config.json", "tokenizer.json"]
    assert beside.step is None and beside.recipe is None


def test_weights_keep_their_numbers_when_cast_up_and_down(run, tmp_path):
    narrow = dense.save(tmp_path / "narrow", dtype=torch.bfloat16)
    wide = converted(narrow, tmp_path / "wide", "shardforge", dtype="fp32")
    again = converted(wide.path, tmp_path / "again", "shardforge", dtype="bf16")
    before, after = weights(narrow), weights(again.path)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert wide.certificate["changes"] == {"cast bfloat16 to float32": len(before)}


def test_a_run_directory_is_not_needed_any_more(published, tmp_path):
    made = converted(published, tmp_path / "ours", "shardforge")
    before = weights(made.path)
    shutil.move(made.path, tmp_path / "elsewhere")
    after = weights(tmp_path / "elsewhere")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "elsewhere" / "conversion.json").read_text())["target"]["format"] == "shardforge"
