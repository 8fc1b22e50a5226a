from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardforge.convert import inspect_numbers
from shardforge.convert.inspect_numbers import Comparison, Numbers, apart, compare, measured, numbers
from shardforge.core.errors import CheckpointError
from shardforge.families.open import open_source
from shardforge.families.shardforge import RunSource
from tests.unit.convert import counted
from tests.unit.convert.folders import converted

SOME = torch.tensor([3.0, -4.0, 0.0, 1.0])


def file(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path)
    return path


def test_norm_mean_largest_and_zeros_are_those_of_the_tensor():
    assert measured(SOME) == Numbers(4, math.sqrt(26), 0.0, 4.0, zeros=1, nan=0, infinite=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_every_type_is_measured(dtype):
    assert measured(SOME.to(dtype)).norm == math.sqrt(26)


def test_what_is_not_finite_is_counted_and_left_out_of_the_rest():
    bad = torch.cat([SOME, torch.tensor([math.nan, math.inf, -math.inf])])
    assert measured(bad) == Numbers(7, math.sqrt(26), 0.0, 4.0, zeros=1, nan=1, infinite=2)


def test_rms_is_over_the_finite_numbers():
    assert measured(torch.tensor([2.0, 2.0, math.nan])).rms == pytest.approx(2.0)


def test_a_tensor_without_numbers_has_norm_zero():
    assert (measured(torch.zeros(0, 3)).norm, measured(torch.zeros(0, 3)).rms) == (0.0, 0.0)


def test_blocks_do_not_change_the_result(monkeypatch):
    one, other = torch.randn(7, 11), torch.randn(7, 11)
    whole = measured(one), apart(one, other)
    monkeypatch.setattr(inspect_numbers, "BLOCK", 5)
    parts = measured(one), apart(one, other)
    assert parts[0].norm == pytest.approx(whole[0].norm) and parts[1].cosine == pytest.approx(whole[1].cosine)
    assert (parts[0].largest, parts[1].largest) == (whole[0].largest, whole[1].largest)


def test_a_difference_is_that_of_its_definition():
    one, other = torch.randn(40).double(), torch.randn(40).double()
    found = apart(one, other)
    assert found.largest == (one - other).abs().max().item()
    assert found.relative == pytest.approx(((one - other).norm() / one.norm()).item())
    assert found.cosine == pytest.approx(torch.nn.functional.cosine_similarity(one, other, dim=0).item())


def test_equal_tensors_differ_nowhere_even_where_nothing_is_a_number():
    bad = torch.tensor([1.0, math.nan, math.inf])
    found = apart(bad, bad.clone())
    assert (found.unequal, found.largest, found.relative) == (0, 0.0, 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_finite_on_one_side_alone_is_infinitely_far(value):
    found = apart(torch.tensor([1.0, 2.0]), torch.tensor([1.0, value]))
    assert (found.unequal, found.largest) == (1, math.inf)


@pytest.mark.parametrize(("one", "other", "cosine"), [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (2.0, -1.0, -1.0)])
def test_the_cosine_of_constants(one, other, cosine):
    assert apart(torch.full((3,), one), torch.full((3,), other)).cosine == pytest.approx(cosine)


def test_the_numbers_of_a_checkpoint_come_in_its_order(run):
    found, broken = numbers(run)
    assert (list(found), broken) == (list(open_source(run).names), {})


def test_what_the_optimizer_keeps_is_measured_when_asked_for(run):
    found, _ = numbers(run, moments=True)
    assert 1 <= found["embed.weight exp_avg"].largest <= 2 and "embed.weight exp_avg_sq" in found


def test_several_processes_find_the_same(run, monkeypatch):
    monkeypatch.setattr(inspect_numbers, "JOB_BYTES", 4000)
    assert numbers(run, processes=2) == numbers(run, processes=1)


def test_a_tensor_that_cannot_be_read_is_told_and_the_others_are_measured(run, tmp_path, monkeypatch):
    whole = RunSource.read

    def read(source: RunSource, name: str) -> torch.Tensor:
        if name == "norm.weight":
            raise CheckpointError("it is gone", source.path, "copy it")
        return whole(source, name)

    monkeypatch.setattr(RunSource, "read", read)
    found, broken = numbers(run)
    assert (list(broken), "norm.weight" in found, len(found) > 1) == (["norm.weight"], False, True)
    assert "it is gone (copy it)" in broken["norm.weight"]


def compared(tmp_path: Path, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> Comparison:
    return compare(file(tmp_path / "a.safetensors", **one), file(tmp_path / "b.safetensors", **other))


def test_the_largest_difference_comes_first(tmp_path):
    one = {name: torch.ones(3) for name in "abc"}
    other = {"a": torch.ones(3), "b": torch.ones(3) * 1.1, "c": torch.ones(3) * 3}
    found = compared(tmp_path, one, other)
    assert (list(found.tensors), found.same) == (["c", "b", "a"], False)


def test_equal_checkpoints_are_the_same(tmp_path):
    assert compared(tmp_path, {"a": SOME}, {"a": SOME}).same


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"z": SOME}, "missing"),
        ({"a": SOME, "b": SOME.clone()}, "extra"),
        ({"a": SOME.view(2, 2)}, "shapes"),
        ({"a": SOME.bfloat16()}, "types"),
    ],
)
def test_names_shapes_and_types_that_differ_are_told(tmp_path, other, field):
    found = compared(tmp_path, {"a": SOME}, other)
    assert not found.same and getattr(found, field)


@pytest.mark.parametrize("to", ["huggingface", "megatron", "deepspeed"])
def test_another_format_of_the_same_numbers_is_the_same(tmp_path, to):
    trained = counted.save(tmp_path / "run")
    converted(trained, tmp_path / "out", to=to)
    assert compare(trained, tmp_path / "out", moments=to != "huggingface").same


def test_a_changed_number_is_found_across_formats(run, published, tmp_path):
    from safetensors.torch import load_file

    for source in published.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    state = load_file(first)
    name = next(iter(state))
    state[name].view(-1)[0] += 0.5
    save_file(state, first)
    found = compare(run, tmp_path)
    worst = next(iter(found.tensors.values()))
    assert (worst.unequal, worst.largest) == (1, pytest.approx(0.5))


def test_names_of_files_are_not_compared_with_ours(run, tmp_path):
    with pytest.raises(CheckpointError, match=r"their names are not alike"):
        compare(run, file(tmp_path / "a.safetensors", a=SOME))
