from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardforge.core.errors import CheckpointError, Problems
from shardforge.families.deepspeed_partitions import PartitionFolder
from tests.unit.families.deepspeed_folders import STEP, numbers, saved, states, zero3, zero12

SHAPES = {"a.weight": (3, 5), "b.bias": (7,), "c.weight": (2, 2, 2)}
WRITERS = {"zero12": zero12, "zero3": zero3}


def check(folder: PartitionFolder, groups) -> None:
    for name, kinds in ((name, kinds) for group in groups for name, kinds in group.items()):
        for kind, tensor in kinds.items():
            read = folder.read_moment(kind, name) if kind else folder.read(name)
            assert torch.equal(read, tensor) and read.shape == tensor.shape, (kind, name)
        assert folder.read_moment("step", name).item() == STEP


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@given(
    shapes=st.lists(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4), max_size=3)
    .filter(len)
    .map(lambda groups: [{f"w{at}.{n}": shape for n, shape in enumerate(group)} for at, group in enumerate(groups)]),
    ranks=st.integers(1, 5),
)
@settings(max_examples=25)
def test_weights_cut_over_any_ranks_are_whole_again(write, shapes, ranks):
    groups = [numbers(group) for group in shapes]
    with tempfile.TemporaryDirectory() as place:
        check(PartitionFolder(write(Path(place) / "step", groups, ranks)), groups)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_missing_rank_is_named(tmp_path, write):
    folder = write(tmp_path / "step", [numbers(SHAPES)], 3)
    next(folder.glob("*zero_pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"1 of the files of 3 ranks are missing.*rank 1"):
        PartitionFolder(folder)


def test_the_model_states_of_every_rank_of_zero_3_are_needed(tmp_path):
    folder = zero3(tmp_path / "step", [numbers(SHAPES)], 3)
    (folder / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="2 of 3 files"):
        PartitionFolder(folder)


def test_partitions_that_are_too_short_are_named_with_both_numbers(tmp_path):
    folder = zero3(tmp_path / "step", [numbers(SHAPES)], 2)
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    found = torch.load(file)
    flats = found["optimizer_state_dict"]["fp32_flat_groups"]
    flats[0] = flats[0][:-3].clone()
    saved(file, found)
    with pytest.raises(Problems, match=r"5 of 8 numbers of c.weight \[2, 2, 2\] are there"):
        PartitionFolder(folder)


def test_tensor_parallel_ranks_are_refused_with_the_way_out(tmp_path):
    folder = zero12(tmp_path / "step", [numbers(SHAPES)], 1)
    saved(folder / "mp_rank_01_model_states.pt", states([numbers(SHAPES)]))
    with pytest.raises(CheckpointError, match=r"tensor or pipeline parallel(.|\n)*ds_to_universal"):
        PartitionFolder(folder)


def test_layers_in_files_of_their_own_are_refused(tmp_path):
    folder = zero12(tmp_path / "step", [numbers(SHAPES)], 1)
    saved(folder / "layer_0_expert_1_mp_rank_00_model_states.pt", {})
    with pytest.raises(CheckpointError, match=r"layer_\*"):
        PartitionFolder(folder)


def test_weights_that_no_optimizer_updates_come_from_the_module(tmp_path):
    module = {"frozen": torch.ones(3, dtype=torch.bfloat16), "a.weight": torch.zeros(3, 5), "copy": torch.ones(2)}
    beside = {"module": module, "shared_params": {"copy": "a.weight"}}
    whole = numbers(SHAPES)
    folder = PartitionFolder(zero12(tmp_path / "step", [whole], 2, **beside))
    assert folder.names.keys() == {*SHAPES, "frozen"} and folder.names["frozen"].dtype == "bfloat16"
    assert torch.equal(folder.read("frozen"), module["frozen"])
    assert torch.equal(folder.read("a.weight"), whole["a.weight"][""])
    with pytest.raises(CheckpointError, match="there is no exp_avg of frozen"):
        folder.read_moment("exp_avg", "frozen")


def test_frozen_weights_of_zero_3_are_joined_from_all_ranks(tmp_path):
    frozen = torch.arange(5.0)
    parts = torch.cat([frozen, torch.zeros(1)]).chunk(2)
    folder = zero3(tmp_path / "step", [numbers(SHAPES)], 2)
    for rank in range(2):
        beside = {"module": {"f": torch.empty(0)}, "frozen_param_shapes": {"f": torch.Size([5])}}
        told = states([numbers(SHAPES)], frozen_param_fragments={"f": parts[rank]}, **beside)
        saved(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", told)
    assert torch.equal(PartitionFolder(folder).read("f"), frozen)


def test_a_training_without_zero_gives_its_weights_alone(tmp_path):
    folder = tmp_path / "step"
    folder.mkdir()
    module = {"a": torch.ones(2, 3)}
    saved(folder / "mp_rank_00_model_states.pt", {"module": module, "param_shapes": None, "global_steps": 3})
    found = PartitionFolder(folder)
    assert torch.equal(found.read("a"), module["a"]) and (found.moments, found.counts) == ((), ())


def test_files_of_a_deepspeed_that_tells_no_places_are_refused(tmp_path):
    folder = zero12(tmp_path / "step", [numbers(SHAPES)], 1)
    inner = {"single_partition_of_fp32_groups": [torch.ones(30)], "partition_count": 1}
    saved(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", {"optimizer_state_dict": inner})
    with pytest.raises(CheckpointError, match=r"before 0.7(.|\n)*newer"):
        PartitionFolder(folder)


@pytest.mark.parametrize("content", [[], {"optimizer": 1}], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    folder = zero12(tmp_path / "step", [numbers(SHAPES)], 1)
    saved(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", content)
    with pytest.raises(CheckpointError, match="optimizer_state_dict"):
        PartitionFolder(folder)
