from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shardforge.checkpoint import folders, index
from shardforge.checkpoint.audit import audit, compare
from shardforge.checkpoint.store import Store
from shardforge.core.errors import CheckpointError
from shardforge.recipe.schema import CheckpointConfig

WEIGHT = {"shape": [100], "dtype": "float32"}


def saved(root: Path, **tensors: torch.Tensor) -> Path:
    tensors = {"model.x": torch.ones(100), "optim.x.step": torch.tensor(3.0)} | tensors
    store = Store(root, CheckpointConfig(), describe={"model": {"x": WEIGHT}})
    store.save(1, tensors, {}, wait=True)
    store.close()
    return root / "step-00000001"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_was_just_saved_is_sound(tmp_path):
    report = audit(saved(tmp_path))
    assert (report.problems, report.step, report.tensors, report.files) == ((), 1, 2, 2)


@pytest.mark.parametrize("position", [0, 30, -1], ids=["length", "header", "numbers"])
def test_one_flipped_bit_is_found(tmp_path, position):
    path = saved(tmp_path) / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    problems = audit(path.parent).problems
    assert "rank-00000.safetensors is not what was written: its SHA-256 differs from the manifest" in problems


def test_a_shortened_file_is_found_with_both_sizes(tmp_path):
    path = saved(tmp_path) / "rank-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    problems = audit(path.parent).problems
    assert f"{path.name} has {len(whole) - 1} bytes, {len(whole)} were committed" in problems


def test_a_missing_file_is_named(tmp_path):
    path = saved(tmp_path) / "rank-00000.safetensors"
    path.unlink()
    assert "rank-00000.safetensors is missing" in audit(path.parent).problems


def test_a_file_that_does_not_belong_is_named(tmp_path):
    folder = saved(tmp_path)
    (folder / ".metadata").write_bytes(b"x")
    assert audit(folder).problems == (".metadata does not belong to this checkpoint",)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e5m2], ids=str)
def test_numbers_that_are_not_finite_are_counted(tmp_path, dtype, bad):
    numbers = torch.zeros(10)
    numbers[3:5] = bad
    problems = audit(saved(tmp_path, **{"optim.x.exp_avg": numbers.to(dtype)})).problems
    assert problems == ("rank-00000.safetensors: optim.x.exp_avg has 2 numbers that are not finite",)


def test_a_checkpoint_that_was_not_committed_is_a_problem(tmp_path):
    folder = saved(tmp_path)
    (folder / folders.MARKER).unlink()
    assert "COMMITTED is missing: this is no committed checkpoint" in audit(folder).problems


def test_a_tensor_that_the_index_does_not_know_is_named(tmp_path):
    folder = saved(tmp_path)
    document = json.loads((folder / index.NAME).read_text())
    del document["tensors"]["optim.x.step"]
    (folder / index.NAME).write_text(json.dumps(document))
    assert "rank-00000.safetensors: tensor optim.x.step is not in the index" in audit(folder).problems


def test_a_tensor_that_only_the_index_knows_is_named(tmp_path):
    folder = saved(tmp_path)
    change(folder / index.NAME, '"key":"optim.x.step"', '"key":"optim.x.stop"')
    assert "rank-00000.safetensors: tensor optim.x.stop is missing" in audit(folder).problems


def test_an_index_unlike_the_model_of_the_manifest_is_named(tmp_path):
    store = Store(tmp_path, CheckpointConfig(), describe={"model": {"x": WEIGHT, "y": WEIGHT}})
    store.save(1, {"model.x": torch.ones(100)}, {}, wait=True)
    assert audit(tmp_path / "step-00000001").problems == ("y: absent in the index, [100] float32 in the manifest",)


def test_a_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        audit(tmp_path / "no")


def test_models_differ_by_name_shape_and_type_only():
    saved = {"model": {"a": WEIGHT, "b": WEIGHT, "c": WEIGHT | {"dims": ["x=100"]}}, "recipe": "1"}
    now = {"model": {"b": WEIGHT | {"shape": [7]}, "c": WEIGHT, "d": WEIGHT | {"dtype": "float64"}}, "recipe": "2"}
    assert compare(saved, now) == [
        "a: [100] float32 in the checkpoint, absent here",
        "b: [100] float32 in the checkpoint, [7] float32 here",
        "d: absent in the checkpoint, [100] float64 here",
    ]
