"""Around through every format: the weights, the optimizer and the losses afterwards are those of a run that stayed."""

from __future__ import annotations

import pytest
import torch

from shardforge.checkpoint import folders
from shardforge.core.rundir import RunDir
from shardforge.families.open import open_source
from tests.faults import runs
from tests.unit.convert.folders import contents, converted
from tests.unit.upcycle import dense

RING = ("megatron", "shardforge", "deepspeed", "shardforge")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps whose checkpoints of step 6 and 12 are there."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = runs.write_recipe(folder, checkpoint={"every": 6, "keep_last": 9})
    assert runs.run(folder, "train", str(recipe)).code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def around(trained, tmp_path_factory):
    """Step 6 of it, after the ring, with optimizer and all."""
    place, at = tmp_path_factory.mktemp("ring"), RunDir(trained).checkpoints / folders.name(6)
    for number, to in enumerate(RING):
        at = converted(at, place / f"{number}-{to}", to, proof="own").path
    return at


def test_weights_and_moments_are_the_same_to_the_bit(trained, around):
    one, other = open_source(RunDir(trained).checkpoints / folders.name(6)), open_source(around)
    assert list(one.names.items()) == list(other.names.items())
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)
    assert one.moments == other.moments == ("exp_avg", "exp_avg_sq")
    for kind in (*one.moments, *one.counts):
        assert all(torch.equal(one.read_moment(kind, name), other.read_moment(kind, name)) for name in one.names)


def test_it_goes_on_with_the_losses_of_the_run_that_stayed(trained, around, tmp_path):
    ended = runs.run(tmp_path, "train", str(around / "recipe.yaml"))
    assert ended.code == 0, ended.err
    stayed, moved = runs.losses(trained), runs.losses(around)
    assert moved == {step: stayed[step] for step in range(7, 13)}


def test_published_weights_come_back_as_the_files_they_were(tmp_path):
    at = first = converted(dense.save(tmp_path / "run"), tmp_path / "hf").path
    for number, to in enumerate((*RING, "huggingface")):
        at = converted(at, tmp_path / f"{number}-{to}", to, proof="own").path
    before, after = contents(first), contents(at)
    assert {name for name in before if before[name] != after[name]} <= {"config.json"}  # the order of its fields
    assert before.keys() == after.keys()
