from __future__ import annotations

import shutil

import pytest
import torch

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.deepspeed_files import UniversalFolder, step_folder
from tests.unit.families.deepspeed_folders import STEP, numbers, saved, universal, zero12

SHAPES = {"a.weight": (3, 5), "b.bias": (7,)}


def test_the_latest_step_of_a_folder_is_found(tmp_path):
    folder = zero12(tmp_path / "global_step5", [numbers(SHAPES)], 1)
    (tmp_path / "latest").write_text("global_step5\n")
    assert step_folder(tmp_path) == step_folder(folder) == folder


def test_a_folder_of_something_else_is_none(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert step_folder(tmp_path) is None


@pytest.mark.parametrize("told", ["gone", "../else", "/tmp"])
def test_a_latest_that_names_no_folder_inside_is_refused(tmp_path, told):
    (tmp_path / "latest_universal").write_text(told)
    with pytest.raises(CheckpointError, match="latest_universal names"):
        step_folder(tmp_path)


def test_weights_moments_and_steps_are_read(tmp_path):
    whole = numbers(SHAPES)
    folder = UniversalFolder(universal(tmp_path / "u", whole))
    assert (folder.moments, folder.counts) == (("exp_avg", "exp_avg_sq"), ("step",))
    for name, kinds in whole.items():
        assert torch.equal(folder.read(name), kinds[""]) and folder.names[name].shape == SHAPES[name]
        assert torch.equal(folder.read_moment("exp_avg", name), kinds["exp_avg"])
        assert folder.read_moment("step", name).item() == STEP


def test_flat_tensors_get_the_shapes_that_the_model_states_tell(tmp_path):
    whole = numbers(SHAPES)
    path = universal(tmp_path / "u", whole)
    for name, kinds in whole.items():
        torch.save(kinds[""].flatten(), path / "zero" / name / "fp32.pt")
    assert torch.equal(UniversalFolder(path).read("a.weight"), whole["a.weight"][""])


def test_a_step_of_all_weights_is_found_where_zero_3_leaves_it(tmp_path):
    path = universal(tmp_path / "u", numbers(SHAPES))
    for name in SHAPES:
        (path / "zero" / name / "step.pt").unlink()
    saved(path / "zero" / "optimizer_state.pt", {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(4.0)}}}})
    folder = UniversalFolder(path)
    assert folder.counts == ("step",) and folder.read_moment("step", "b.bias").item() == 4


def test_second_names_of_a_weight_are_left_out(tmp_path):
    whole = numbers(SHAPES | {"head.weight": (3, 5)}, kinds=("",))
    path = universal(tmp_path / "u", whole, shared_params={"head.weight": "a.weight"})
    assert UniversalFolder(path).names.keys() == SHAPES.keys()


def test_weights_alone_have_no_moments(tmp_path):
    path = universal(tmp_path / "u", numbers(SHAPES, kinds=("",)))
    for name in SHAPES:
        (path / "zero" / name / "step.pt").unlink()
    folder = UniversalFolder(path)
    assert (folder.moments, folder.counts) == ((), ())


def test_every_lost_file_of_moments_is_named(tmp_path):
    path = universal(tmp_path / "u", numbers(SHAPES))
    (path / "zero" / "a.weight" / "exp_avg.pt").unlink()
    (path / "zero" / "b.bias" / "step.pt").unlink()
    with pytest.raises(Problems, match=r"a.weight  exp_avg.pt is missing(.|\n)*b.bias  step.pt is missing"):
        UniversalFolder(path)


def test_a_tensor_of_another_size_is_refused_with_both_numbers(tmp_path):
    path = universal(tmp_path / "u", numbers(SHAPES))
    torch.save({"param": torch.ones(4)}, path / "zero" / "b.bias" / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"4 numbers are here, b.bias \[7\] has 7"):
        UniversalFolder(path).read_moment("exp_avg", "b.bias")


@pytest.mark.parametrize("keep", [0, 100])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = universal(tmp_path / "u", numbers(SHAPES))
    file = path / "zero" / "a.weight" / "fp32.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"a.weight/fp32.pt"):
        UniversalFolder(path)


def test_a_folder_without_any_weight_is_refused(tmp_path):
    path = universal(tmp_path / "u", numbers(SHAPES))
    for name in SHAPES:
        shutil.rmtree(path / "zero" / name)
    with pytest.raises(CheckpointError, match=r"there is no fp32.pt"):
        UniversalFolder(path)


@pytest.mark.parametrize("content", [[1], {"module": {}}], ids=str)
def test_model_states_of_something_else_are_refused(tmp_path, content):
    path = universal(tmp_path / "u", numbers(SHAPES))
    saved(path / "mp_rank_00_model_states.pt", content)
    with pytest.raises(CheckpointError, match="global_steps"):
        UniversalFolder(path)
