from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardforge.checkpoint import building, tensorfile
from shardforge.checkpoint.tensorfile import Part
from shardforge.convert import certificate
from shardforge.convert import run as engine
from shardforge.core.errors import CheckpointError, DataError, ForgeError
from shardforge.families import fingerprint as fingerprints
from shardforge.families import memory
from shardforge.families.open import open_source
from tests.unit.convert import counted
from tests.unit.convert.folders import contents, converted, weights
from tests.unit.upcycle import dense


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.fixture
def failing(monkeypatch):
    """failing(2): the second file of tensors, and all after it, find no room on the disk; failing(): no longer."""
    real = tensorfile.write_tensors

    def make(number: int = 0) -> list[str]:
        written: list[str] = []

        def write(path: Path, parts: list[Part], *rest):
            written.append(path.name)
            if number and len(written) >= number:
                raise OSError(28, "No space left on device")
            return real(path, parts, *rest)

        monkeypatch.setattr(tensorfile, "write_tensors", write)
        return written

    return make


def test_there_and_back_again_is_the_same_to_the_bit(published, tmp_path):
    converted(published, tmp_path / "ours", "shardforge")
    converted(tmp_path / "ours", tmp_path / "back", shard_bytes=8000)
    before, after = contents(published), contents(tmp_path / "back")
    assert {name for name in before if before[name] != after[name]} == {"config.json"}  # the order of its fields
    assert json.loads((published / "config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )


def test_any_number_of_processes_writes_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PROCESS_BYTES", 1)
    one = converted(run, tmp_path / "one", shard_bytes=8000, processes=1)
    two = converted(run, tmp_path / "two", shard_bytes=8000, processes=2)
    assert contents(one.path) == contents(two.path)
    assert one.certificate["tensors"] == two.certificate["tensors"]


def test_the_same_call_again_changes_nothing(run, tmp_path):
    made = converted(run, tmp_path / "hf")
    before = {file: file.stat().st_mtime_ns for file in made.path.iterdir()}
    again = converted(run, tmp_path / "hf")
    assert not again.fresh and again.certificate == json.loads(json.dumps(made.certificate))
    assert before == {file: file.stat().st_mtime_ns for file in made.path.iterdir()}


def test_nothing_is_left_beside_the_result(run, tmp_path):
    converted(run, tmp_path / "hf")
    assert names(tmp_path) == ["hf"]


def test_other_options_are_refused_with_what_differs(run, tmp_path):
    made = converted(run, tmp_path / "hf")
    before = contents(made.path)
    with pytest.raises(CheckpointError, match="dtype: source there, bf16 here"):
        converted(run, tmp_path / "hf", dtype="bf16")
    assert contents(made.path) == before


def test_another_source_of_the_same_shapes_is_refused(run, tmp_path):
    converted(run, tmp_path / "hf")
    other = dense.save(tmp_path / "other", model={"init": {"std": 0.2}})
    with pytest.raises(CheckpointError, match=r"another source(.|\n)*source.numbers: \w+ there, \w+ here"):
        converted(other, tmp_path / "hf")


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A copy of a model whose large matrices no fingerprint reads; turned(path) gives one of them another sign."""
    monkeypatch.setattr(fingerprints, "SAMPLED_NUMBERS", 300)
    return shutil.copytree(dense.save(tmp_path / "saved"), tmp_path / "large")


def turned(path: Path) -> None:
    """Other numbers in the largest weight, where only the file's time tells."""
    step = open_source(path).path
    weight = max(open_source(path).names, key=lambda name: open_source(path).read(name).numel())
    for file in step.glob("*.safetensors"):
        tensors = load_file(file)
        tensors |= {key: -value for key, value in tensors.items() if key == f"model.{weight}"}
        save_file(tensors, file)


def test_a_source_that_differs_in_a_large_matrix_alone_is_another_one(large, tmp_path):
    made = converted(large, tmp_path / "hf")
    prints = fingerprints.fingerprint(open_source(large))
    turned(large)
    assert fingerprints.fingerprint(open_source(large)) == prints, "the fingerprint tells them apart by itself"
    with pytest.raises(CheckpointError, match=r"another source, or before(.|\n)*source\.files\..*safetensors: "):
        converted(large, tmp_path / "hf")
    assert made.path.is_dir()


def test_a_source_that_lies_elsewhere_is_another_one(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    converted(run, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"another source(.|\n)*source\.path: .*moved"):
        converted(tmp_path / "moved", tmp_path / "hf")


def test_a_resumed_conversion_does_not_mix_two_sources(large, tmp_path, failing):
    failing(3)
    with pytest.raises(CheckpointError):
        converted(large, tmp_path / "hf", shard_bytes=5000)
    failing()
    turned(large)
    with pytest.raises(CheckpointError, match=r"unfinished conversion(.|\n)*source\.files\."):
        converted(large, tmp_path / "hf", shard_bytes=5000)
    assert not (tmp_path / "hf").exists()


def test_a_result_that_was_moved_is_still_the_one(run, tmp_path):
    converted(run, tmp_path / "hf").path.rename(tmp_path / "other")
    assert not converted(run, tmp_path / "other").fresh


@pytest.mark.parametrize("asked", [{"proof": "own"}, {"proof": "own", "bisect": True}], ids=str)
def test_a_proof_that_the_result_lacks_is_made(run, tmp_path, asked):
    converted(run, tmp_path / "hf", proof="none" if len(asked) == 1 else "own")
    again = converted(run, tmp_path / "hf", **asked)
    assert again.proved and not again.fresh and again.certificate["proof"]["passed"]
    assert certificate.read(tmp_path / "hf") == json.loads(json.dumps(again.certificate))
    assert not converted(run, tmp_path / "hf", **asked).proved and names(tmp_path) == ["hf"]


def test_a_proof_of_what_was_made_before_can_fail(run, tmp_path):
    made = converted(run, tmp_path / "hf")
    with (made.path / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        sign = file.read()[0] ^ 0x80
        file.seek(-1, os.SEEK_END)
        file.write(bytes([sign]))
    with pytest.raises(ForgeError, match=r"weight\[.* in the source and .* here"):
        converted(run, tmp_path / "hf", proof="own")
    assert not certificate.read(made.path)["proof"]["passed"]


@pytest.mark.parametrize("harm, told", [(Path.unlink, "is gone"), (lambda file: file.write_text("{}"), "2 bytes")])
def test_a_result_that_lost_something_is_not_the_one(run, tmp_path, harm, told):
    harm(converted(run, tmp_path / "hf").path / "config.json")
    with pytest.raises(CheckpointError, match=f"not whole any more:\n *config.json .*{told}"):
        converted(run, tmp_path / "hf")


def test_a_folder_of_something_else_is_refused(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something else: notes"):
        converted(run, tmp_path / "mine")
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["notes.txt"]


def test_an_empty_folder_is_as_good_as_none(run, tmp_path):
    (tmp_path / "hf").mkdir()
    assert converted(run, tmp_path / "hf").fresh


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_a_target_in_its_source_or_around_it_is_refused(run, place):
    with pytest.raises(CheckpointError, match="lie in one another"):
        converted(run, run / place)


def test_a_link_to_a_folder_is_that_folder(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to(tmp_path / "disk" / "hf")
    made = converted(run, tmp_path / "hf")
    assert made.path == tmp_path / "disk" / "hf" and names(tmp_path / "disk") == ["hf"]
    assert (tmp_path / "hf" / "conversion.json").is_file() and not converted(run, tmp_path / "hf").fresh


def test_the_folder_that_a_command_runs_in_is_no_target(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="the folder that the command runs in"):
        converted(run, Path())
    assert names(tmp_path) == []


def test_where_a_disk_is_mounted_is_no_target(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path / "hf")
    with pytest.raises(CheckpointError, match="a disk is mounted"):
        converted(run, tmp_path / "hf")
    assert names(tmp_path) == []


@pytest.mark.parametrize("called, name", [("hf", "huggingface"), ("HF", "huggingface"), ("mcore", "megatron")])
def test_what_people_call_a_format_is_understood(run, tmp_path, called, name):
    with pytest.raises(CheckpointError) as found:
        converted(run, tmp_path / "x", called)
    assert found.value.fix == f"did you mean {name!r}?"


def test_an_unknown_format_lists_the_known_ones(run, tmp_path):
    with pytest.raises(CheckpointError, match="'huggingface'"):
        converted(run, tmp_path / "hf", "hugingface")


def test_a_full_disk_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1000 B left"):
        converted(run, tmp_path / "hf")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_no_target(run, tmp_path, monkeypatch):
    put, blocks = tensorfile.put, []

    def full(file, block):
        blocks.append(len(block))
        if len(blocks) == 12:
            put(file, block[: len(block) // 2])
            raise OSError(28, "No space left on device", file.name)
        put(file, block)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left") as found:
        patch.setattr(tensorfile, "put", full)
        converted(run, tmp_path / "hf", shard_bytes=5000)
    assert "free space" in found.value.fix and names(tmp_path) == [".hf.partial"]
    made = converted(run, tmp_path / "hf", shard_bytes=5000)
    assert contents(made.path) == contents(converted(run, tmp_path / "whole", shard_bytes=5000).path)


def test_finished_files_are_kept_and_a_changed_one_is_made_again(run, tmp_path, failing):
    failing(3)
    with pytest.raises(CheckpointError):
        converted(run, tmp_path / "hf", shard_bytes=5000)
    first = sorted((tmp_path / ".hf.partial" / "files").glob("*.safetensors"))[0]
    with first.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    written = failing()
    made = converted(run, tmp_path / "hf", shard_bytes=5000)
    count = len(list(made.path.glob("*.safetensors")))
    assert count > 3 and len(written) == count - 1 and first.name in written
    assert contents(made.path) == contents(converted(run, tmp_path / "whole", shard_bytes=5000).path)


def test_an_unfinished_one_with_other_options_is_refused(run, tmp_path, failing):
    failing(1)
    with pytest.raises(CheckpointError):
        converted(run, tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"unfinished conversion(.|\n)*dtype: source there, bf16 here"):
        converted(run, tmp_path / "hf", dtype="bf16")


def test_two_calls_for_one_target_do_not_meet(run, tmp_path, monkeypatch):
    real = engine._write

    def meanwhile(*args):
        with pytest.raises(CheckpointError, match="another process is writing here"):
            converted(run, tmp_path / "hf")
        return real(*args)

    monkeypatch.setattr(engine, "_write", meanwhile)
    assert converted(run, tmp_path / "hf").fresh


def test_a_call_that_comes_just_after_another_finds_its_result(run, tmp_path, monkeypatch):
    real = building.claimed

    @contextmanager
    def late(*args):
        monkeypatch.setattr(building, "claimed", real)
        converted(run, tmp_path / "hf")
        with real(*args):
            yield

    monkeypatch.setattr(building, "claimed", late)
    assert not converted(run, tmp_path / "hf").fresh and names(tmp_path) == ["hf"]


@pytest.mark.parametrize("free, count", [(10**9, 3), (4 * 4 * 32 * 16, 2), (1, 1)])
def test_there_are_no_more_processes_than_memory_holds(run, tmp_path, monkeypatch, free, count):
    """The largest tensor here is the embedding, 32 x 16 numbers of 4 bytes."""
    counts: list[int] = []
    real = engine._write
    monkeypatch.setattr(memory, "free", lambda: free)
    monkeypatch.setattr(
        engine, "_write", lambda made, processes, shown: counts.append(processes) or real(made, 1, shown)
    )
    converted(run, tmp_path / "hf", processes=3)
    assert counts == [count]


def test_a_worker_that_dies_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "PROCESS_BYTES", 1)
    with pytest.raises(DataError, match="one of 2 workers was killed"):
        converted(run, tmp_path / "hf", shard_bytes=8000, processes=2, opener=dense.dying)
    assert names(tmp_path) == [".hf.partial"]


def test_a_source_that_changes_meanwhile_is_told(run, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    real = tensorfile.write_tensors

    def write(path, parts, *rest):
        (open_source(copy).path / "note").write_text("new")
        return real(path, parts, *rest)

    monkeypatch.setattr(tensorfile, "write_tensors", write)
    with pytest.raises(CheckpointError, match="note changed while it was read"):
        converted(copy, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_result_that_computes_something_else_is_not_committed(run, tmp_path, monkeypatch):
    """One number is turned on its way to the disk, so that every hash is that of the wrong number."""
    from shardforge.convert import pieces

    def made(self, tensor, *places):
        if tensor.dim() == 2 and any("mlp.up_proj" in name for name, _ in places):
            tensor = tensor.clone()
            tensor[0, 0] = -tensor[0, 0]
        return real(self, tensor, *places)

    real = pieces.Pieces._hashed
    monkeypatch.setattr(pieces.Pieces, "_hashed", made)
    with pytest.raises(ForgeError, match=r"blocks\.0|ffn\.up"):
        converted(run, tmp_path / "hf", proof="own")
    assert names(tmp_path) == [".hf.partial"]


@pytest.mark.parametrize("to", ["shardforge", "deepspeed", "megatron"])
def test_moments_that_were_exchanged_are_not_committed(tmp_path, monkeypatch, to):
    """On their way to the disk, so that every hash is that of the wrong numbers."""
    from shardforge.convert import pieces

    exchanged = {"exp_avg": "exp_avg_sq", "exp_avg_sq": "exp_avg"}
    source, real = counted.save(tmp_path / "run"), pieces.Pieces._read
    with monkeypatch.context() as patch, pytest.raises(ForgeError, match=r"exp_avg of .*weight\[0.* in the source"):
        patch.setattr(pieces.Pieces, "_read", lambda self, name, kind: real(self, name, exchanged.get(kind, kind)))
        converted(source, tmp_path / "out", to, proof="own")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path / ".out.partial")
    made = converted(source, tmp_path / "out", to, proof="own")
    assert made.certificate["proof"]["moments"] >= 2 * made.certificate["proof"]["weights"]


def test_numbers_that_are_not_finite_are_converted_and_named(run, tmp_path):
    converted(run, tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 3:5] = torch.nan
    save_file(state, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    made = converted(tmp_path / "hf", tmp_path / "ours", "shardforge")
    assert made.certificate["odd"] == {"model.blocks.1.ffn.up.weight": 2}
    assert weights(made.path)["blocks.1.ffn.up.weight"].isnan().sum() == 2
