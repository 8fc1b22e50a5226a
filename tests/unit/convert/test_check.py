"""A converted folder that was touched is not what its certificate says, and all that is wrong is said at once."""

from __future__ import annotations

import json
import shutil

import pytest

from shardforge.convert import certificate
from shardforge.convert.check import check
from shardforge.convert.format import Options
from shardforge.convert.run import convert
from shardforge.core.errors import CheckpointError, Problems
from tests.unit.convert.test_proof import ours
from tests.unit.families.deepspeed_folders import numbers, zero12
from tests.unit.families.test_deepspeed import SHAPES, described
from tests.unit.upcycle import dense


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of ours as a Hugging Face folder of several files, and the folder above both."""
    path = tmp_path_factory.mktemp("check")
    source = ours(path / "source")
    convert(source, path / "target", Options("huggingface", shard_bytes=4000), proof="own", processes=1)
    return path


@pytest.fixture
def folder(made, tmp_path):
    """A copy to harm."""
    return shutil.copytree(made / "target", tmp_path / "target")


def told(folder, **how):
    with pytest.raises(Problems) as found:
        check(folder, **how)
    return str(found.value)


def rewritten(folder, change):
    """The certificate says something else."""
    found = certificate.read(folder)
    change(found)
    (folder / certificate.NAME).write_text(json.dumps(found))
    return folder


def flip(file, at=-3):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_an_untouched_folder_is_as_certified(folder):
    found = check(folder)
    assert found.weights == 21 and found.files == len(shards(folder)) + 3 and not found.notes
    assert str(found).startswith(f"as certified: {found.files} files") and "proved with own" in str(found)


def test_a_byte_that_flipped_is_found_in_its_file_and_its_weight(folder):
    file = shards(folder)[1]
    flip(file)
    text = told(folder)
    assert str(file) in text and "was written" in text and "is not what was read of the source" in text


def test_all_that_is_wrong_is_said_at_once(folder):
    first, second = shards(folder)[:2]
    flip(first)
    flip(second)
    (folder / "generation_config.json").unlink()
    text = told(folder)
    assert str(first) in text and str(second) in text and "generation_config.json  the file is gone" in text


def test_a_truncated_file_is_found_by_its_size(folder):
    file = shards(folder)[0]
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-8])
    assert f"the file has {size - 8} bytes, {size} were written" in told(folder)


def test_other_settings_are_another_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    text = told(folder)
    assert "config.json  the file has" in text and "eps is 0.5 here" in text


def test_a_certificate_of_other_weights_does_not_fit(folder):
    def change(found):
        found["weights"]["model.norm.weight"]["sha256"] = "0" * 64

    assert "model.norm.weight is not what was read of the source" in told(rewritten(folder, change))


def test_a_file_that_was_added_is_noted(folder):
    (folder / "README.md").write_text("mine")
    assert check(folder).notes == ("added since: README.md",)


def test_a_certificate_cannot_name_files_elsewhere(folder, tmp_path):
    (tmp_path / "secret").write_text("1")

    def change(found):
        found["target"]["files"]["../secret"] = {"bytes": 1, "sha256": "0" * 64}

    assert "outside of the folder" in told(rewritten(folder, change))


def test_without_a_certificate_there_is_nothing_to_check(tmp_path):
    with pytest.raises(CheckpointError, match="no certificate"):
        check(tmp_path)


def test_a_certificate_that_says_nothing_is_told(folder):
    with pytest.raises(CheckpointError, match="says nothing that can be checked"):
        check(rewritten(folder, lambda found: found.pop("target")))


def test_it_is_proved_again_on_request(folder):
    assert "--proof own was asked for" in str(check(folder, proof="own"))


def test_every_layer_is_told_on_request(folder):
    assert "blocks.1 " in str(check(folder, proof="own", bisect=True)) and "blocks.1 " not in str(check(folder))


def test_a_source_that_needs_a_config_is_proved_again_with_that_of_its_conversion(tmp_path):
    """A folder of DeepSpeed whose names are Hugging Face's says nothing of its model."""
    source = zero12(tmp_path / "theirs" / "global_step5", [numbers(SHAPES)], 2)
    config = described(tmp_path) / "config.json"
    convert(source, tmp_path / "hf", Options("huggingface", config=config), proof="own", processes=1)
    assert certificate.read(tmp_path / "hf")["source"]["config"] == str(config.resolve())
    assert check(tmp_path / "hf", proof="own").proof["passed"]
    config.rename(tmp_path / "other.json")
    assert "config.json" in told(tmp_path / "hf", proof="own")
    assert check(tmp_path / "hf", proof="own", config=tmp_path / "other.json").proof["passed"]


def test_moments_are_proved_again_too(tmp_path):
    source = dense.save(tmp_path / "source", trained=True)
    convert(source, tmp_path / "target", Options("shardforge"), proof="own", processes=1)
    assert check(tmp_path / "target", proof="own").proof["moments"] == 21 * 3


def test_a_proof_that_fails_today_is_told(made, folder, tmp_path):
    """Nothing is wrong with the folder, but another checkpoint lies where its source was."""
    other = ours(tmp_path / "other", lambda state: state["norm.weight"].add_(1))
    path = str(next((other / "checkpoints").glob("step-*")))
    text = told(rewritten(folder, lambda found: found["source"].update(path=path)), proof="own")
    assert "norm.weight[0] is 2 in the source and 1 here" in text


def test_a_source_that_is_gone_cannot_prove_anything(folder):
    text = told(rewritten(folder, lambda found: found["source"].update(path="/nowhere/at/all")), proof="own")
    assert "/nowhere/at/all  there is nothing here" in text


def test_of_cast_weights_the_files_are_compared_and_the_note_says_so(made, tmp_path):
    target = tmp_path / "half"
    convert(made / "source", target, Options("huggingface", dtype="bf16"), proof="own", processes=1)
    assert "21 weights were cast" in check(target).notes[0]
    assert check(target, proof="own").proof["comparisons"][0]["tolerance"] == 0.03


def test_what_the_optimizer_keeps_is_compared_too(tmp_path):
    source = dense.save(tmp_path / "source", trained=True)
    convert(source, tmp_path / "target", Options("shardforge"), proof="none", processes=1)
    found = check(tmp_path / "target")
    assert found.weights == 21 * 4 and not found.notes and "not proved: --proof none" in str(found)
